/* The limit of memory: passes over arrays that do nothing else.
 *
 * A pass reads (read), reads and writes (copy), or reads twice and writes (triad), in vectors as wide as the
 * compiler's flags allow, in order, with or without a software prefetch; writes bypass the caches where the
 * processor can. Each thread takes one contiguous share, cut at cache lines. A read may also go through a few
 * places of its share in turns, which on Zen 3 is 1.1 to 1.3 times as fast (2, 4 and 8 places gain less than
 * 3; a copy gains nothing). Times are taken by the caller (limits.py).
 *
 * And how crowded the cores are: a processor's other hyperthread may belong to someone else.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LINE 64
#define UNROLL 8
#define STEP (UNROLL * sizeof(vector))
/* Far enough ahead for memory to answer, near enough not to be evicted again from the first cache. */
#define AHEAD 2048
#define STREAMS 3

#if defined(__AVX512F__)
typedef uint64_t vector __attribute__((vector_size(64), aligned(1), may_alias));
#define STREAM(to, value) _mm512_stream_si512((void *)(to), (__m512i)(value))
#elif defined(__AVX2__)
typedef uint64_t vector __attribute__((vector_size(32), aligned(1), may_alias));
#define STREAM(to, value) _mm256_stream_si256((void *)(to), (__m256i)(value))
#elif defined(__x86_64__)
typedef uint64_t vector __attribute__((vector_size(16), aligned(1), may_alias));
#define STREAM(to, value) _mm_stream_si128((void *)(to), (__m128i)(value))
#else
typedef uint64_t vector __attribute__((vector_size(16), aligned(1), may_alias));
#define STREAM(to, value) (*(vector *)(to) = (value))
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vector at(const char *from) { return *(const vector *)from; }

INLINE void prefetch(const char *from, int on)
{
    if (on) {
        for (size_t line = 0; line < STEP; line += LINE) {
            __builtin_prefetch(from + AHEAD + line, 0, 3);
        }
    }
}

/* Shares of n bytes, in whole lines but for the last; `written` sets where the lines start. */
INLINE void share(size_t n, const void *written, int part, int parts, size_t *start, size_t *stop)
{
    size_t head = (size_t)(-(uintptr_t)written) % LINE;
    head = head < n ? head : n;
    size_t lines = (n - head) / LINE;
    *start = part == 0 ? 0 : head + lines * (size_t)part / (size_t)parts * LINE;
    *stop = part == parts - 1 ? n : head + lines * (size_t)(part + 1) / (size_t)parts * LINE;
}

INLINE uint64_t read_share(const char *x, size_t n, int ahead, size_t streams)
{
    vector sum[UNROLL] = {0};
    size_t each = n / streams / STEP * STEP;
    for (size_t i = 0; i < each; i += STEP) {
        for (size_t stream = 0; stream < streams; stream++) {
            const char *from = x + stream * each + i;
            prefetch(from, ahead);
            for (int k = 0; k < UNROLL; k++) {
                sum[k] += at(from + (size_t)k * sizeof(vector));
            }
        }
    }
    uint64_t total = 0;
    for (size_t i = streams * each; i < n; i++) {
        total += (unsigned char)x[i];
    }
    for (int k = 1; k < UNROLL; k++) {
        sum[0] += sum[k];
    }
    for (size_t lane = 0; lane < sizeof(vector) / sizeof(uint64_t); lane++) {
        total += sum[0][lane];
    }
    return total;
}

/* `y` is the second array, its elements halved `halvings` times against x's, or NULL for a copy. A triad adds
 * the bytes' words: the sum itself is of no use. */
INLINE void write_share(char *out, const char *x, const char *y, size_t n, int halvings, int ahead)
{
    size_t i = (size_t)(-(uintptr_t)out) % LINE;
    i = i < n ? i : n;
    memcpy(out, x, i);
    for (; i + (STEP << halvings) <= n; i += STEP) {
        prefetch(x + i, ahead);
        if (y) {
            prefetch(y + (i >> halvings), ahead);
        }
        for (size_t k = i; k < i + STEP; k += sizeof(vector)) {
            vector value = at(x + k);
            if (y) {
                value += at(y + (k >> halvings));
            }
            STREAM(out + k, value);
        }
    }
    memcpy(out + i, x + i, n - i);
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* `manner` is 0 for a pass in order, 1 for one with prefetch, 2 (reads alone) for one in streams. */
uint64_t limit_read(const char *x, size_t n, int threads, int manner)
{
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int part = 0; part < threads; part++) {
        size_t start, stop;
        share(n, x, part, threads, &start, &stop);
        total += manner == 2   ? read_share(x + start, stop - start, 0, STREAMS)
                 : manner == 1 ? read_share(x + start, stop - start, 1, 1)
                               : read_share(x + start, stop - start, 0, 1);
    }
    return total;
}

void limit_copy(char *out, const char *x, size_t n, int threads, int ahead)
{
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        size_t start, stop;
        share(n, out, part, threads, &start, &stop);
        if (ahead) {
            write_share(out + start, x + start, NULL, stop - start, 0, 1);
        } else {
            write_share(out + start, x + start, NULL, stop - start, 0, 0);
        }
    }
}

void limit_triad(char *out, const char *x, const char *y, size_t n, int halvings, int threads, int ahead)
{
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        size_t start, stop;
        share(n, out, part, threads, &start, &stop);
        const char *second = y + (start >> halvings);
        if (ahead) {
            write_share(out + start, x + start, second, stop - start, halvings, 1);
        } else {
            write_share(out + start, x + start, second, stop - start, halvings, 0);
        }
    }
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* An addition that no compiler leaves out, or joins with another */
#define ADD(a)  \
    (a) += one; \
    __asm__ volatile("" : "+r"(a))
#define FOUR(what) \
    what;          \
    what;          \
    what;          \
    what
#define LENGTH 100

/* How many times as long as one chain of additions four beside it take, which a core of four units for them
 * does in the time of one (1.1 to 1.15), if it is not shared (1.3 to 2.1); the fastest of a few times each.
 */
static double crowding_here(void)
{
    uint64_t a = 0, b = 0, c = 0, d = 0, one = 1;
    double one_chain = 1, four_chains = 1;
    __asm__ volatile("" : "+r"(one));
    for (int repeat = 0; repeat < 5; repeat++) {
        double start = seconds();
        for (int i = 0; i < LENGTH; i++) {
            FOUR(FOUR(ADD(a)));
            FOUR(FOUR(ADD(a)));
        }
        double half = seconds();
        for (int i = 0; i < LENGTH; i++) {
            FOUR(FOUR(ADD(a); ADD(b); ADD(c); ADD(d)));
            FOUR(FOUR(ADD(a); ADD(b); ADD(c); ADD(d)));
        }
        double end = seconds();
        one_chain = half - start < one_chain ? half - start : one_chain;
        four_chains = end - half < four_chains ? end - half : four_chains;
    }
    return four_chains / one_chain;
}

/* That of the most crowded core */
double limit_crowding(int threads)
{
    double most = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(max : most)
    for (int thread = 0; thread < threads; thread++) {
        double here = crowding_here();
        most = here > most ? here : most;
    }
    return most;
}
