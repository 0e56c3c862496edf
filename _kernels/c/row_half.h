/* Rows of contiguous float16 or bfloat16, most of their chunks: those of numbers that are neither infinite
 * nor far below the row's largest.
 *
 * Their order as numbers is that of their bits, but for the sign, so three sweeps of small integers tell the
 * largest, the smallest, and whether there is NaN; a chunk is swept while the one before it is summed. Then
 * nothing has to be guarded against in the sum: the logits are converted in registers, and the exponent is
 * added to that of 2^f. A group of vectors goes step by step, as the chain of one is longer than a processor
 * looks ahead.
 */
typedef int16_t half_vector __attribute__((vector_size(VECTOR_BYTES)));

typedef int16_t half_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

enum { HALF_GROUP = 4 * f32_LANES, HALF_CHUNK = 2048 };

/* By lane, as int16 but for the last */
typedef struct {
    half_vector high; /* the largest number if there is one with a positive sign */
    half_vector low;  /* else the largest is this one; the smallest if there is none with a negative sign */
    half_vector far;  /* else the smallest is this one, as uint16 */
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

INLINE half_vector half_low(half_vector a, half_vector b)
{
#if defined VECTOR_AVX512
    return (half_vector)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif defined VECTOR_AVX2
    return (half_vector)_mm256_min_epi16((__m256i)a, (__m256i)b);
#else
    half_vector mask = a < b;
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
    half_vector bits[2] = {half_load(x), half_load(x + VECTOR_BYTES / 2)};
    sweep->high = half_high(sweep->high, half_high(bits[0], bits[1]));
    sweep->low = half_low(sweep->low, half_low(bits[0], bits[1]));
    sweep->far = half_far(sweep->far, half_far(bits[0], bits[1]));
}

static half_sweep sweep_of_none(void)
{
    half_vector none = {0};
    return (half_sweep){none + INT16_MIN, none + INT16_MAX, none};
}

/* The chunk that follows, and what is swept of it */
typedef struct {
    const uint16_t *x, *swept, *last; /* where the next group and the last one start */
    half_sweep sweep;
} half_following;

INLINE void sweep_along(half_following *next)
{
    sweep_group(&next->sweep, next->swept);
    next->swept = next->swept < next->last ? next->swept + HALF_GROUP : next->last;
}

static half_following following(const uint16_t *x, ptrdiff_t n)
{
    return (half_following){x, x, x + (n / HALF_GROUP - 1) * HALF_GROUP, sweep_of_none()};
}

typedef struct {
    uint16_t largest, smallest;
} half_range;

static half_range range_of_halves(const half_sweep *sweep, const uint16_t *rest, ptrdiff_t n_rest)
{
    enum { LANES = VECTOR_BYTES / 2 };
    int16_t high[LANES], low[LANES], highest = INT16_MIN, lowest = INT16_MAX;
    uint16_t far[LANES], farthest = 0;
    memcpy(high, &sweep->high, sizeof high);
    memcpy(low, &sweep->low, sizeof low);
    memcpy(far, &sweep->far, sizeof far);
    for (int i = 0; i < LANES; i++) {
        highest = high[i] > highest ? high[i] : highest;
        lowest = low[i] < lowest ? low[i] : lowest;
        farthest = far[i] > farthest ? far[i] : farthest;
    }
    for (ptrdiff_t i = 0; i < n_rest; i++) {
        int16_t bits = (int16_t)rest[i];
        highest = bits > highest ? bits : highest;
        lowest = bits < lowest ? bits : lowest;
        farthest = rest[i] > farthest ? rest[i] : farthest;
    }
    return (half_range){(uint16_t)(highest >= 0 ? highest : lowest),
                        lowest < 0 ? farthest : (uint16_t)lowest};
}

/* Where the number of these bits, which is there, first stands */
static ptrdiff_t find_half(const uint16_t *x, ptrdiff_t n, uint16_t bits)
{
    uint16_t same = (bits & 0x7fff) ? bits : bits ^ 0x8000; /* zeros are equal */
    ptrdiff_t c = 0;
    for (int found = 0; c + HALF_GROUP <= n; c += HALF_GROUP) {
        for (int j = 0; j < HALF_GROUP; j++)
            found |= (x[c + j] == bits) | (x[c + j] == same);
        if (found)
            break;
    }
    while (x[c] != bits && x[c] != same)
        c++;
    return c;
}

INLINE float half_value(dtype_code dtype, uint16_t half)
{
    return dtype == DTYPE_F16 ? half_to_float(half) : bfloat_to_float(half);
}

/* Logits as they lie, of two vectors in their order or in turns */
INLINE void load_halves_f32(dtype_code dtype, const uint16_t *x, f32_vector *even, f32_vector *odd)
{
#ifdef VECTOR_AVX512
    if (dtype == DTYPE_F16) {
        *even = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
        *odd = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + f32_LANES)));
        return;
    }
#elif defined VECTOR_AVX2
    if (dtype == DTYPE_F16) {
        *even = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
        *odd = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + f32_LANES)));
        return;
    }
#endif
    (void)dtype;
    f32_ivector pairs = (f32_ivector)half_load(x);
    *even = (f32_vector)(pairs << 16);
    *odd = (f32_vector)(pairs & (int32_t)0xffff0000);
}

/* exp(x)*2^-k of numbers that are neither NaN nor far from k, in place */
INLINE void exp_in_range(f32_vector x[4], f32_vector magic)
{
    f32_vector shifted[4];
    for (int j = 0; j < 4; j++)
        shifted[j] = f32_fma(x[j], f32_all(LOG2E), magic);
    for (int j = 0; j < 4; j++)
        x[j] = f32_fraction(x[j], shifted[j] - magic, LOG2_BASE);
    f32_exp2_units(x, 4, 0);
    for (int j = 0; j < 4; j++)
        x[j] = (f32_vector)((f32_ivector)x[j] + ((f32_ivector)shifted[j] << MANTISSA_BITS));
}

INLINE double sum_halves(dtype_code dtype, const uint16_t *x, ptrdiff_t n_groups, float exponent,
                         half_following *following)
{
    f32_vector zero = f32_all(0), magic = f32_all(MAGIC - exponent);
    f32_chained_sum sum = {zero, zero};
    half_following next = *following;
    for (ptrdiff_t g = 0; g < n_groups; g++, x += HALF_GROUP) {
        f32_vector e[4];
        for (size_t line = 0; line < 2 * HALF_GROUP; line += 64)
            __builtin_prefetch((const char *)x + PREFETCH_BYTES + line);
        sweep_along(&next);
        load_halves_f32(dtype, x, e, e + 1);
        load_halves_f32(dtype, x + 2 * f32_LANES, e + 2, e + 3);
        exp_in_range(e, magic);
        f32_chain(&sum, (e[0] + e[1]) + (e[2] + e[3]), g);
    }
    *following = next;
    return f32_lanes_sum(sum.sum + sum.chain);
}

static __attribute__((noinline)) double sum_bfloats(const uint16_t *x, ptrdiff_t n_groups, float exponent,
                                                    half_following *next)
{
    return sum_halves(DTYPE_BF16, x, n_groups, exponent, next);
}

static __attribute__((noinline)) double sum_float16s(const uint16_t *x, ptrdiff_t n_groups, float exponent,
                                                     half_following *next)
{
    return sum_halves(DTYPE_F16, x, n_groups, exponent, next);
}

/* At most a group, without the logit at `top` */
static double sum_few_halves(dtype_code dtype, const uint16_t *x, ptrdiff_t n, ptrdiff_t top, float exponent)
{
    float ALIGNED lane[HALF_GROUP];
    f32_exp_scale scale = f32_exp_scale_of(f32_all(exponent));
    f32_vector sum = f32_all(0);
    for (int j = 0; j < HALF_GROUP; j += f32_LANES)
        f32_store(lane + j, f32_all(-INFINITY));
    f32_load_run(dtype, (const char *)x, 2, n, lane);
    if (top >= 0 && top < n)
        lane[top] = -INFINITY;
    for (int j = 0; j < HALF_GROUP; j += f32_LANES)
        sum += f32_exp_scaled(f32_load(lane + j), scale);
    return f32_lanes_sum(sum);
}

/* Of a row of fewer classes too much is its ends and its largest: it is converted to float32 as a whole. */
enum { HALF_CLASSES = 4096 };

/* Add a chunk to the row, if it is of this kind; returns whether it was. `next` is it, what was swept of it,
 * and then the n_next logits after it. */
static int add_halves(row_statistics *row, dtype_code dtype, const char *logits, ptrdiff_t n,
                      ptrdiff_t first_class, ptrdiff_t n_next, half_following *next)
{
    const uint16_t *x = (const uint16_t *)(const void *)logits;
    ptrdiff_t n_groups = n / HALF_GROUP, top = -1;
#ifndef VECTOR_X86
    if (dtype == DTYPE_F16)
        return 0;
#endif
    if (next->x != x)
        *next = following(x, n);
    while (n_groups && next->swept < next->last)
        sweep_along(next);
    if (n_groups)
        sweep_along(next);
    half_range range = range_of_halves(&next->sweep, x + n_groups * HALF_GROUP, n % HALF_GROUP);
    float largest = half_value(dtype, range.largest), smallest = half_value(dtype, range.smallest);
    double exponent = rint(fmax(largest, row->largest) * LOG2_BASE) - f32_HEADROOM;
    next->x = NULL;
    if (row->shift != 0 || !(fabs(largest) <= DIRECT) ||
        !(smallest >= (fmax(exponent, row->exponent) - (EXPONENT_BIAS - 3)) * 0.6931472))
        return 0;
    if (largest > row->largest) {
        top = find_half(x, n, range.largest);
        f32_raise_largest(row, largest, first_class + top, 0);
    }
    double (*sum)(const uint16_t *, ptrdiff_t, float, half_following *) =
        dtype == DTYPE_F16 ? sum_float16s : sum_bfloats;
    float k = (float)row->exponent;
    ptrdiff_t whole = top >= 0 && top / HALF_GROUP < n_groups ? top / HALF_GROUP : n_groups;
    *next = n_next >= HALF_GROUP ? following(x + n, n_next) : following(x, HALF_GROUP);
    if (whole)
        add(&row->sum, sum(x, whole, k, next));
    if (whole < n_groups) {
        const uint16_t *group = x + whole * HALF_GROUP;
        add(&row->sum, sum_few_halves(dtype, group, HALF_GROUP, top - whole * HALF_GROUP, k));
        add(&row->sum, sum(group + HALF_GROUP, n_groups - whole - 1, k, next));
    }
    if (n % HALF_GROUP)
        add(&row->sum,
            sum_few_halves(dtype, x + n_groups * HALF_GROUP, n % HALF_GROUP, top - n_groups * HALF_GROUP, k));
    if (n_next < HALF_GROUP)
        next->x = NULL;
    return 1;
}

/* Finite numbers, rounded to nearest even, to `to`; around the cache if it streams and there is an
 * instruction for it */
INLINE void put_halves(dtype_code dtype, f32_vector v, char *to, int streams)
{
    typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    words bits = (words)v;
    halves rounded = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, halves);
#ifdef VECTOR_AVX512
    if (dtype == DTYPE_F16)
        rounded = (halves)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    if (streams) {
        _mm256_stream_si256((__m256i *)(void *)to, (__m256i)rounded);
        return;
    }
#elif defined VECTOR_AVX2
    if (dtype == DTYPE_F16)
        rounded = (halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    if (streams) {
        _mm_stream_si128((__m128i *)(void *)to, (__m128i)rounded);
        return;
    }
#endif
    (void)dtype, (void)streams;
    memcpy(to, &rounded, sizeof rounded);
}

/* stream_scaled for a result of 16 bits; 0 if that is not to be had. */
static int store_scaled_halves(dtype_code dtype, char *to, const float *exps, ptrdiff_t n, f32_vector factor,
                               const f32_exceptions *but, int streams)
{
    int in_lines = streams && (uintptr_t)to % VECTOR_BYTES == 0;
#ifndef VECTOR_X86
    if (dtype == DTYPE_F16)
        return 0;
#endif
    if (factor[0] != factor[0])
        return 0;
    for (ptrdiff_t c = 0; c < n; c += f32_LANES) {
        f32_vector p = f32_load(exps + c) * factor;
        float ALIGNED lane[f32_LANES];
        if ((size_t)(but->at[0] - c) < f32_LANES || (size_t)(but->at[1] - c) < f32_LANES) {
            f32_store(lane, p);
            f32_except(lane, c, f32_LANES, but);
            p = f32_load(lane);
        }
        if (n - c >= f32_LANES) {
            put_halves(dtype, p, to + 2 * c, in_lines);
        } else {
            put_halves(dtype, p, (char *)lane, 0);
            memcpy(to + 2 * c, lane, 2 * (size_t)(n - c));
        }
    }
    return 1;
}
