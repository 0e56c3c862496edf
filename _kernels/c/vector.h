/* The few vector operations the kernels need, for one instruction set and both real types.
 *
 * Types and arithmetic are the compiler's own (GCC and Clang vector extensions), so one text serves SSE2,
 * NEON and AVX2; intrinsics stand only where an instruction set has something better: fused multiply-add, and
 * the masks and exponent scaling of AVX-512. A stamp defines ISA (its name) and VECTOR_BYTES before including
 * this.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#ifdef VECTOR_X86
#include <immintrin.h>
#endif

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))

/* A load waits for a store just before it to the same place of another page. So what is written while
 * something is read starts `apart` from that within a page: so many bytes on from `p`, which lies on a line.
 */
INLINE size_t bytes_to(const void *p, const void *read, size_t apart)
{
    return ((uintptr_t)read / 64 * 64 + apart - (uintptr_t)p) % PAGE;
}

/* Makes streamed stores visible to other threads. */
INLINE void fence(void)
{
#ifdef VECTOR_X86
    _mm_sfence();
#endif
}

#define REAL f64
#define REAL_IS_F64
#include "vector_real.h"
#undef REAL
#undef REAL_IS_F64
#define REAL f32
#include "vector_real.h"
#undef REAL
