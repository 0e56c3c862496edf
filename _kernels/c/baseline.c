/* Any processor: 16-byte vectors of the compiler's own (SSE2, NEON). */
#define ISA baseline
#define VECTOR_BYTES 16
#define VECTORS_AT_ONCE 2
#include "stamp.h"
