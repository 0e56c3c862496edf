#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ISA avx512
#define VECTOR_BYTES 64
#define VECTOR_X86
#define VECTOR_FMA
#define VECTOR_AVX512
#define VECTORS_AT_ONCE 4
#include "stamp.h"
#endif
