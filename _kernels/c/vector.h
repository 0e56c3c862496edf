/* The few vector operations the kernels need, for one instruction set and both real types.
 *
 * Types and arithmetic are the compiler's own (GCC and Clang vector extensions), so one text serves SSE2,
 * NEON and AVX2; intrinsics stand only where an instruction set has something better: fused multiply-add, and
 * the masks and exponent scaling of AVX-512. A stamp defines ISA (its name) and VECTOR_BYTES before including
 * this.
 */
#include <math.h>
#include <stddef.h>
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

/* What is written before it is read. It is full of NaN on the sanitizers' build, to show where it is not. */
#ifdef LOGITLOSS_POISON
#define FRESH(object) memset(&(object), 0xff, sizeof(object))
#else
#define FRESH(object) ((void)0)
#endif

/* A load waits for a store just before it to the same place of another page. So what is written while
 * something is read starts `apart` from that within a page: so many bytes on from `p`, which lies on a line.
 */
INLINE size_t bytes_to(const void *p, const void *read, size_t apart)
{
    return ((uintptr_t)read / 64 * 64 + apart - (uintptr_t)p) % PAGE;
}

/* Of what a loop reads of memory, n bytes at p: what lies behind them is fetched meanwhile. A loop that does
 * without has memory and arithmetic take turns. No line may be left out, as those fetched keep the
 * processor's own prefetchers from seeing a stream. Past an array's end it fetches nothing. */
INLINE void fetch_ahead(const void *p, ptrdiff_t n, distances behind)
{
    for (ptrdiff_t line = 0; line < n; line += 64) {
        __builtin_prefetch((const char *)p + line + behind.second, 0, 2);
        __builtin_prefetch((const char *)p + line + behind.first, 0, 3);
    }
}

INLINE ptrdiff_t farther(distances behind)
{
    return behind.first > behind.second ? behind.first : behind.second;
}

/* Makes streamed stores visible to other threads. */
INLINE void fence(void)
{
#ifdef VECTOR_X86
    _mm_sfence();
#endif
}

/* Whether a*b + c is rounded but once */
#ifdef VECTOR_FMA
enum { IS_FUSED = 1 };
#else
enum { IS_FUSED = 0 };
#endif

/* Whether a vector's reals are put in any order by one operation */
#ifdef VECTOR_X86
enum { CAN_SPREAD = 1 };
#else
enum { CAN_SPREAD = 0 };
#endif

#define REAL f64
#define REAL_IS_F64
#include "vector_real.h"
#undef REAL
#undef REAL_IS_F64
#define REAL f32
#include "vector_real.h"
#undef REAL
