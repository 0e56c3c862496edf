/* Chunks of contiguous float16 or bfloat16 in which the row's largest does not change: most chunks of a long
 * row.
 *
 * Their order as numbers is that of their bits, but for the sign, so three sweeps of small integers tell the
 * largest, the smallest, and whether there is NaN. Then nothing has to be guarded against in the sum: the
 * logits are converted in registers, and the exponent is added to that of 2^f. Second, kept exponentials on
 * their way to a gradient of 16 bits.
 */
typedef struct {
    int16_t high; /* the largest number if there is one with a positive sign */
    int16_t low;  /* else the largest is this one */
    uint16_t far; /* the smallest number if there is one with a negative sign */
} half_range;

INLINE half_range range_of_halves(const uint16_t *x, ptrdiff_t n)
{
    int16_t high = INT16_MIN, low = INT16_MAX;
    uint16_t far = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        int16_t bits = (int16_t)x[i];
        high = bits > high ? bits : high;
        low = bits < low ? bits : low;
        far = x[i] > far ? x[i] : far;
    }
    return (half_range){high, low, far};
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
    f32_ivector pairs;
    memcpy(&pairs, x, sizeof pairs);
    *even = (f32_vector)(pairs << 16);
    *odd = (f32_vector)(pairs & (int32_t)0xffff0000);
}

/* exp(x)*2^-k of numbers that are neither NaN nor far from k */
INLINE f32_vector exp_in_range(f32_vector x, f32_vector magic)
{
    f32_vector shifted = f32_fma(x, f32_all(LOG2E), magic);
    f32_vector p = f32_exp2_unit(f32_fraction(x, shifted - magic, LOG2_BASE));
    return (f32_vector)((f32_ivector)p + ((f32_ivector)shifted << MANTISSA_BITS));
}

INLINE double sum_halves(dtype_code dtype, const uint16_t *x, ptrdiff_t n, float exponent)
{
    f32_vector zero = f32_all(0), magic = f32_all(MAGIC - exponent);
    f32_chained_sum sum = {zero, zero};
    for (ptrdiff_t g = 0; g < n / (2 * f32_LANES); g++) {
        const uint16_t *group = x + g * 2 * f32_LANES;
        f32_vector even, odd;
        __builtin_prefetch((const char *)group + PREFETCH_BYTES);
        load_halves_f32(dtype, group, &even, &odd);
        f32_chain(&sum, exp_in_range(even, magic) + exp_in_range(odd, magic), g);
    }
    return f32_lanes_sum(sum.sum + sum.chain);
}

static __attribute__((noinline)) double sum_bfloats(const uint16_t *x, ptrdiff_t n, float exponent)
{
    return sum_halves(DTYPE_BF16, x, n, exponent);
}

static __attribute__((noinline)) double sum_float16s(const uint16_t *x, ptrdiff_t n, float exponent)
{
    return sum_halves(DTYPE_F16, x, n, exponent);
}

/* Add a chunk to the row, if it is of this kind; returns whether it was. */
static int add_halves(row_statistics *row, dtype_code dtype, const char *logits, ptrdiff_t n)
{
    const uint16_t *x = (const uint16_t *)(const void *)logits;
    int is_float16 = dtype == DTYPE_F16;
    uint16_t infinity = is_float16 ? 0x7c00 : 0x7f80;
#ifndef VECTOR_X86
    if (is_float16)
        return 0;
#endif
    if (n % (2 * f32_LANES) != 0 || !isfinite(row->largest) || row->shift != 0)
        return 0;
    half_range range = range_of_halves(x, n);
    uint16_t last = (uint16_t)(range.high >= 0 ? range.high : range.low);
    float largest = is_float16 ? half_to_float(last) : bfloat_to_float(last);
    float smallest = is_float16 ? half_to_float(range.far) : bfloat_to_float(range.far);
    float floor = ((float)row->exponent - (EXPONENT_BIAS - 3)) * 0.6931472f;
    if ((range.high >= 0 && last > infinity) || !(largest <= row->largest))
        return 0;
    if (range.far >= 0x8000 && !(smallest >= floor))
        return 0;
    add(&row->sum,
        is_float16 ? sum_float16s(x, n, (float)row->exponent) : sum_bfloats(x, n, (float)row->exponent));
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
