#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#define VECTOR_BYTES 32
#define VECTOR_X86
#define VECTOR_FMA
#define VECTORS_AT_ONCE 2
#define VECTOR_AVX2
#include "stamp.h"
#endif
