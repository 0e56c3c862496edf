/* Softmax or gradient of rows of contiguous float16 or bfloat16, of the same type: from the logits, which are
 * nearer than their exponentials, twice as long, would be.
 *
 * An entry is K*2^f*2^(n + k), with n + f = (x - largest)*log2(e) + offset and whole numbers n and k. K is a
 * little less than the root of 2, so that K*2^f lies in [1, 2], where bfloat16 counts by 2^-7: a constant
 * with that last bit, added in the last step of 2^f, rounds it. As an integer it has the significand in its
 * low bits then, to which n + k and the sign are added.
 */
#define HALF_K 0x1.6ap0f /* 181/128 */
#define HALF_LOG2_K 0.4998458870832054

typedef struct {
    f32_vector largest, offset, floor, magic;
    const f32_map_row *row;
    f32_exceptions but;
} half_map;

/* What the entries of a row need; returns whether they can be had so: not if the gradient's largest is near
 * the end of float32's range. */
static int half_map_of(dtype_code dtype, const finished_row *done, half_map *map)
{
    double bound = fmax(fabs(done->at_top), done->label >= 0 ? fabs(done->at_label) : 0);
    double power = fma(done->largest - done->shift, LOG2_BASE, -done->exponent) + log2(fabs(done->factor));
    double k = rint(power);
    if (!(bound >= 0x1p-90 && bound <= 0x1p90) || !(fabs(k) <= 100))
        return 0;
    map->largest = f32_all((float)done->largest);
    map->offset = f32_all((float)(power - k - HALF_LOG2_K));
    /* What is no normal number of float32 is 0: in bfloat16 so -127.5 is, by either rounding. */
    map->floor = f32_all((float)((dtype == DTYPE_BF16 ? -127.5 : -126) - k));
    map->magic = f32_all(MAGIC + (float)k + (done->factor < 0 ? 256 : 0));
    return 1;
}

/* Entries of a group, two vectors of them; with is_exact, returns whether some may be no normal numbers. Odd
 * ones of bfloat16 come on top of even ones: the constant that stands above the even ones is taken from
 * theirs. */
INLINE int map_half_group(dtype_code dtype, int is_exact, const uint16_t *x, const half_map *map,
                          half_vector entries[2])
{
    const float even = HALF_K + 0x1p16f + 126, odd = even + 49;
    f32_vector f[4], p[4];
    f32_ivector n[4];
    int are_low = 0;
    load_halves_f32(dtype, x, f, f + 1);
    load_halves_f32(dtype, x + 2 * f32_LANES, f + 2, f + 3);
    for (int j = 0; j < 4; j++)
        f[j] = f32_fma(f[j] - map->largest, f32_all(LOG2E), map->offset);
    if (is_exact)
        are_low = f32_any(f32_greater(map->floor + 2, f32_min(f32_min(f[0], f[1]), f32_min(f[2], f[3]))));
    for (int j = 0; j < 4; j++)
        f[j] = f32_max(map->floor, f[j]);
    for (int j = 0; j < 4; j++) {
        f32_vector shifted = f[j] + map->magic;
        f[j] -= shifted - map->magic;
        n[j] = (f32_ivector)shifted;
    }
    /* f32_exp2_unit, times K */
    for (int j = 0; j < 4; j++)
        p[j] = f32_fma(f[j], f32_all(0x1.ebe29ep-10f), f32_all(0x1.c02104p-7f));
    for (int j = 0; j < 4; j++)
        p[j] = f32_fma(p[j], f[j], f32_all(0x1.417f46p-4f));
    for (int j = 0; j < 4; j++)
        p[j] = f32_fma(p[j], f[j], f32_all(0x1.5bd796p-2f));
    for (int j = 0; j < 4; j++)
        p[j] = f32_fma(p[j], f[j], f32_all(0x1.f5d6a4p-1f));
    for (int j = 0; j < 4; j++)
        p[j] = f32_fma(p[j], f[j], f32_all(dtype == DTYPE_F16 ? HALF_K : j % 2 ? odd : even));
    for (int j = 0; j < 4; j++)
        n[j] = (f32_ivector)p[j] + (n[j] << (dtype == DTYPE_F16 ? MANTISSA_BITS : 7));
    for (int j = 0; j < 2; j++) {
#if defined VECTOR_AVX512
        __m256i low = _mm512_cvtps_ph((__m512)n[2 * j], _MM_FROUND_TO_NEAREST_INT);
        __m256i high = _mm512_cvtps_ph((__m512)n[2 * j + 1], _MM_FROUND_TO_NEAREST_INT);
        half_vector in_order = (half_vector)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined VECTOR_AVX2
        __m128i low = _mm256_cvtps_ph((__m256)n[2 * j], _MM_FROUND_TO_NEAREST_INT);
        __m128i high = _mm256_cvtps_ph((__m256)n[2 * j + 1], _MM_FROUND_TO_NEAREST_INT);
        half_vector in_order = (half_vector)_mm256_set_m128i(high, low);
#else
        half_vector in_order = {0};
#endif
        entries[j] = dtype == DTYPE_F16 ? in_order : (half_vector)(n[2 * j] + (n[2 * j + 1] << 16));
    }
    return are_low;
}

/* Entries of n classes, at most a group, by way of a copy: those that are not as the others, too */
static void map_few_halves(dtype_code dtype, int is_exact, const uint16_t *x, ptrdiff_t n,
                           const half_map *map, ptrdiff_t first, char *to)
{
    float ALIGNED logits[HALF_GROUP], exact[HALF_GROUP];
    uint16_t ALIGNED few[HALF_GROUP] = {0}, entries[HALF_GROUP];
    half_vector mapped[2];
    memcpy(few, x, 2 * (size_t)n);
    int are_low = map_half_group(dtype, is_exact, few, map, mapped);
    memcpy(entries, mapped, sizeof entries);
    if (are_low) {
        f32_load_run(dtype, (const char *)few, 2, HALF_GROUP, logits);
        f32_row_map(SOFTMAX, logits, NULL, NULL, exact, HALF_GROUP, map->row);
        for (int i = 0; i < HALF_GROUP; i++)
            if (!(entries[i] & 0x7f80))
                entries[i] = float_to_bfloat(exact[i]);
    }
    for (int k = 0; k < 2; k++)
        if (map->but.at[k] >= first && map->but.at[k] < first + n)
            entries[map->but.at[k] - first] =
                dtype == DTYPE_F16 ? float_to_half(map->but.value[k]) : float_to_bfloat(map->but.value[k]);
    memcpy(to, entries, 2 * (size_t)n);
}

INLINE void map_halves(dtype_code dtype, int is_exact, int streams, const uint16_t *x, ptrdiff_t n,
                       const half_map *map, char *to)
{
    ptrdiff_t c = streams ? -(uintptr_t)to % 64 / 2 : 0;
    const half_map local = *map; /* which no store can change */
    const ptrdiff_t *at = local.but.at;
    c = c < n ? c : n;
    if (c)
        map_few_halves(dtype, is_exact, x, c, map, 0, to);
    for (; c + HALF_GROUP <= n; c += HALF_GROUP) {
        half_vector entries[2];
        if ((size_t)(at[0] - c) < HALF_GROUP || (size_t)(at[1] - c) < HALF_GROUP ||
            map_half_group(dtype, is_exact, x + c, &local, entries)) {
            map_few_halves(dtype, is_exact, x + c, HALF_GROUP, map, c, to + 2 * c);
            continue;
        }
        for (int j = 0; j < 2; j++) {
            char *place = to + 2 * c + j * VECTOR_BYTES;
            if (streams)
                f32_stream((float *)(void *)place, (f32_vector)entries[j]);
            else
                *(half_unaligned *)(void *)place = entries[j];
        }
    }
    if (c < n)
        map_few_halves(dtype, is_exact, x + c, n - c, map, c, to + 2 * c);
}

/* Functions of their own, so that each has the registers to itself */
#define MAP_HALVES(name, dtype, is_exact, streams)                                                  \
    static __attribute__((noinline)) void name(const uint16_t *x, ptrdiff_t n, const half_map *map, \
                                               char *to)                                            \
    {                                                                                               \
        map_halves(dtype, is_exact, streams, x, n, map, to);                                        \
    }
MAP_HALVES(map_bfloats, DTYPE_BF16, 0, 0)
MAP_HALVES(map_bfloats_exact, DTYPE_BF16, 1, 0)
MAP_HALVES(map_float16s, DTYPE_F16, 0, 0)
#ifdef VECTOR_X86
MAP_HALVES(stream_bfloats, DTYPE_BF16, 0, 1)
MAP_HALVES(stream_bfloats_exact, DTYPE_BF16, 1, 1)
MAP_HALVES(stream_float16s, DTYPE_F16, 0, 1)
#else
#define stream_bfloats map_bfloats
#define stream_bfloats_exact map_bfloats_exact
#define stream_float16s map_float16s
#endif
#undef MAP_HALVES

/* Whether a job's second pass is of this kind */
static int maps_halves(const softmax_job *job)
{
    const array_view *x = &job->logits, *out = &job->out;
#ifndef VECTOR_X86
    if (x->dtype == DTYPE_F16)
        return 0;
#endif
    return x->itemsize == 2 && out->dtype == x->dtype && x->class_stride == 2 && out->class_stride == 2 &&
           job->n_classes >= HALF_CLASSES && !job->lse_in.data && !job->gamma &&
           (job->second_pass == SOFTMAX || (job->second_pass == GRADIENT && job->target_kind == LABELS));
}

/* The second pass over n classes of a row, from `first` on; 0 if the row is not of this kind */
static int map_half_row(const softmax_job *job, const char *logits, ptrdiff_t first, ptrdiff_t n,
                        const finished_row *done, const f32_map_row *row, char *to)
{
    const uint16_t *x = (const uint16_t *)(const void *)logits;
    dtype_code dtype = job->logits.dtype;
    half_map map = {
        .row = row,
        .but = {{done->top - first, done->label - first}, {(float)done->at_top, (float)done->at_label}}};
    if (!done->is_live || !half_map_of(dtype, done, &map))
        return 0;
    if (dtype == DTYPE_F16)
        (job->streams ? stream_float16s : map_float16s)(x, n, &map, to);
    else if (job->second_pass == SOFTMAX)
        (job->streams ? stream_bfloats_exact : map_bfloats_exact)(x, n, &map, to);
    else
        (job->streams ? stream_bfloats : map_bfloats)(x, n, &map, to);
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
