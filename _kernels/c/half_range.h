/* Largest and smallest of 16-bit numbers. Their order as numbers is that of their bits, but for the sign, so
 * two sweeps of small integers tell both, and whether there is NaN; a chunk is swept while the one before it
 * is summed.
 */
typedef int16_t half_vector __attribute__((vector_size(VECTOR_BYTES)));

typedef int16_t half_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

enum { HALF_GROUP = 4 * f32_LANES, HALF_SPAN = 8 * HALF_GROUP, HALF_CHUNK = 4096 };

/* By lane */
typedef struct {
    half_vector high; /* as int16: the largest number if there is one with a positive sign */
    half_vector far;  /* as uint16: the smallest if there is one with a negative sign */
} half_sweep;

INLINE half_vector half_load(const uint16_t *x) { return *(const half_unaligned *)x; }

INLINE half_vector half_high(half_vector a, half_vector b)
{
#if defined VECTOR_AVX512
    return (half_vector)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined VECTOR_AVX2
    return (half_vector)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
    half_vector mask = a > b;
    return (mask & a) | (~mask & b);
#endif
}

INLINE half_vector half_far(half_vector a, half_vector b)
{
#if defined VECTOR_AVX512
    return (half_vector)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif defined VECTOR_AVX2
    return (half_vector)_mm256_max_epu16((__m256i)a, (__m256i)b);
#else
    const half_vector flip = (half_vector){0} + INT16_MIN;
    return half_high(a ^ flip, b ^ flip) ^ flip;
#endif
}

INLINE void sweep_group(half_sweep *sweep, const uint16_t *x)
{
    for (int j = 0; j < 2; j++) {
        half_vector bits = half_load(x + j * (VECTOR_BYTES / 2));
        sweep->high = half_high(sweep->high, bits);
        sweep->far = half_far(sweep->far, bits);
    }
}

/* The chunk that follows, and what is swept of it */
typedef struct {
    const uint16_t *x;
    ptrdiff_t n, swept; /* where the next group starts */
    half_sweep sweep;
} half_following;

static half_following following(const uint16_t *x, ptrdiff_t n)
{
    half_vector none = {0};
    return (half_following){x, n, 0, {none + INT16_MIN, none}};
}

/* Where to sweep n numbers more. What it has not all of is swept later; meanwhile its first are again. */
INLINE const uint16_t *sweep_ahead(half_following *next, ptrdiff_t n)
{
    if (next->swept + n > next->n)
        return next->x;
    next->swept += n;
    return next->x + next->swept - n;
}

typedef struct {
    uint16_t largest, smallest;
} half_range;

/* The largest lane, as int16 */
INLINE int16_t half_lanes_high(half_vector v)
{
#ifdef VECTOR_X86
    typedef int16_t eight __attribute__((vector_size(16)));
    eight part[VECTOR_BYTES / 16], high;
    memcpy(part, &v, sizeof part);
    high = part[0];
    for (int i = 1; i < VECTOR_BYTES / 16; i++)
        high = (eight)_mm_max_epi16((__m128i)high, (__m128i)part[i]);
    return (int16_t)(_mm_extract_epi16(_mm_minpos_epu16((__m128i)(high ^ 0x7fff)), 0) ^ 0x7fff);
#else
    int16_t high = v[0];
    for (int i = 1; i < VECTOR_BYTES / 2; i++)
        high = v[i] > high ? v[i] : high;
    return high;
#endif
}

INLINE int half_any(half_vector mask)
{
#if defined VECTOR_AVX512
    return _mm512_test_epi16_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined VECTOR_AVX2
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    return half_lanes_high(~mask + 1) > 0;
#endif
}

/* Of n >= HALF_GROUP numbers, what was not swept of them included */
static half_range range_of_halves(half_following *chunk)
{
    const half_vector flip = (half_vector){0} + INT16_MIN;
    int16_t lowest = INT16_MAX;
    for (; chunk->swept + HALF_GROUP <= chunk->n; chunk->swept += HALF_GROUP)
        sweep_group(&chunk->sweep, chunk->x + chunk->swept);
    if (chunk->n % HALF_GROUP)
        sweep_group(&chunk->sweep, chunk->x + chunk->n - HALF_GROUP);
    int16_t highest = half_lanes_high(chunk->sweep.high);
    uint16_t farthest = (uint16_t)(half_lanes_high(chunk->sweep.far ^ flip) ^ INT16_MIN);
    if (highest >= 0 && farthest > INT16_MAX)
        return (half_range){(uint16_t)highest, farthest};
    /* Of one sign: what is nearest to 0 is lowest as int16. */
    for (ptrdiff_t c = 0; c < chunk->n; c++) {
        int16_t bits = (int16_t)chunk->x[c];
        lowest = bits < lowest ? bits : lowest;
    }
    return (half_range){highest >= 0 ? (uint16_t)highest : (uint16_t)lowest,
                        farthest > INT16_MAX ? farthest : (uint16_t)lowest};
}

/* Where the number of these bits, which is there, first stands among n >= HALF_GROUP */
static ptrdiff_t find_half(const uint16_t *x, ptrdiff_t n, uint16_t bits)
{
    uint16_t same = (bits & 0x7fff) ? bits : bits ^ 0x8000; /* zeros are equal */
    half_vector a = (half_vector){0} + (int16_t)bits, b = (half_vector){0} + (int16_t)same;
    ptrdiff_t c = 0;
    for (; c + HALF_GROUP <= n; c += HALF_GROUP) {
        half_vector low = half_load(x + c), high = half_load(x + c + VECTOR_BYTES / 2);
        if (half_any((low == a) | (low == b) | (high == a) | (high == b)))
            break;
    }
    while (x[c] != bits && x[c] != same)
        c++;
    return c;
}
