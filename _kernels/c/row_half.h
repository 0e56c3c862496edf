/* Rows of contiguous float16 or bfloat16, most of their chunks: those of numbers that are neither infinite
 * nor far below the row's largest. Their range is known before they are summed (half_range.h): nothing has to
 * be guarded against in the sum, and the logits are converted in registers, in one flat loop.
 */
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

/* 2^f for |f| <= 1/2/PARTS as HALF_UNIT times a polynomial whose first coefficient is 1, which saves a
 * product: relative error 1.4*2^-24 before rounding, or less */
#if PART_BITS == 5
#define HALF_UNIT 0x1.ebfccc586302fp-3
static const float half_terms[] = {0x1.715528p+1f, 0x1.0a69ccp+2f};
#elif PART_BITS == 3
#define HALF_UNIT 0x1.c6a5a016bdcd8p-5
static const float half_terms[] = {0x1.151118p+2f, 0x1.8fa90ep+3f, 0x1.204b44p+4f};
#else
#define HALF_UNIT 0x1.5c09c9e0c3326p-10
static const float half_terms[] = {0x1.d2691ep+2f, 0x1.4e7740p+5f, 0x1.69df16p+7f, 0x1.050a6ep+9f,
                                   0x1.789a32p+9f};
#endif

/* Of two vectors at once, AVX2's sixteen registers do not hold the sums, too, which then wait for memory. */
enum { HALVES_AT_ONCE = VECTOR_BYTES > 32 ? 2 : 1 };

/* exp(x)*2^-k/HALF_UNIT of n <= 2 vectors, in place but for a factor `power` */
INLINE void half_exp_parts(f32_vector *x, f32_vector *power, int n, f32_vector magic)
{
    f32_vector f[2];
    for (int j = 0; j < n; j++)
        power[j] = f32_fma(x[j], f32_all(LOG2E), magic);
    for (int j = 0; j < n; j++)
        f[j] = f32_fraction(x[j], power[j] - magic, LOG2_BASE);
    for (int j = 0; j < n; j++)
        power[j] = f32_power_of_parts(power[j]);
    for (int j = 0; j < n; j++)
        x[j] = f[j] + half_terms[0];
#pragma GCC unroll 8
    for (int k = 1; k < (int)(sizeof half_terms / sizeof(float)); k++)
        for (int j = 0; j < n; j++)
            x[j] = f32_fma(x[j], f[j], f32_all(half_terms[k]));
}

/* Sums as in row_statistics, but for HALF_UNIT; square, spread and n_before where there is a ranking. The
 * logits are relative to `reference` in `spread`. */
typedef struct {
    f32_vector sum[2], square[2], spread[2];
} half_sums;
typedef struct {
    dtype_code dtype;
    f32_exp_scale scale;
    f32_vector reference;
    int has_figures;
    const f32_ranking *ranking; /* or NULL: nothing is to be counted */
} half_summing;

INLINE half_summing summing_halves(dtype_code dtype, const row_statistics *row, int has_figures,
                                   const f32_ranking *ranking)
{
    return (half_summing){dtype, f32_exp_scale_of(f32_all((float)row->exponent)),
                          f32_all((float)row->largest), has_figures, ranking};
}

/* Add two vectors of logits, and count those above the bound. */
INLINE void add_exps(const half_summing *with, f32_vector x[2], f32_vector bound, half_sums *to,
                     f32_counter *n_before)
{
    f32_vector power[2], gap[2];
    if (with->ranking) {
        const f32_mask above[2] = {f32_greater(x[0], bound), f32_greater(x[1], bound)};
        *n_before = f32_count(*n_before, above, 2);
    }
    for (int k = 0; with->has_figures && k < 2; k++)
        gap[k] = with->reference - x[k];
    for (int k = 0; k < 2; k++) {
        if (HALVES_AT_ONCE == 1 || k == 0)
            half_exp_parts(x + k, power + k, HALVES_AT_ONCE, f32_parts_magic(with->scale));
        if (!with->has_figures) {
            to->sum[k] = f32_fma(x[k], power[k], to->sum[k]);
            continue;
        }
        f32_vector e = x[k] * power[k];
        to->sum[k] += e;
        to->square[k] = f32_fma(e, e, to->square[k]);
        to->spread[k] = f32_fma(e, gap[k], to->spread[k]);
    }
}

INLINE half_sums no_halves(void)
{
    const f32_vector zero = f32_all(0);
    return (half_sums){{zero, zero}, {zero, zero}, {zero, zero}};
}

INLINE void add_half_sums(row_statistics *row, const half_summing *with, const half_sums *sums,
                          f32_counter n_before)
{
    add(&row->sum, HALF_UNIT * f32_lanes_sum(sums->sum[0] + sums->sum[1]));
    if (!with->has_figures)
        return;
    add(&row->square, HALF_UNIT * HALF_UNIT * f32_lanes_sum(sums->square[0] + sums->square[1]));
    add(&row->spread, HALF_UNIT * f32_lanes_sum(sums->spread[0] + sums->spread[1]));
    row->n_before += f32_counted(n_before);
}

/* What the classes of a group at number c of the chunk are ranked against */
INLINE f32_vector half_bound(const half_summing *with, ptrdiff_t c)
{
    const f32_ranking *ranking = with->ranking;
    if (!ranking)
        return f32_all(0);
    return f32_all(c + HALF_GROUP <= ranking->label ? ranking->below : ranking->logit);
}

/* Add a group at number c of the chunk, from its number `from` on, but for that at `top`. */
static void sum_some_halves(row_statistics *row, const half_summing *with, const uint16_t *x, ptrdiff_t c,
                            ptrdiff_t from, ptrdiff_t top)
{
    enum { LANES = VECTOR_BYTES / 2 };
    const half_vector none =
        (half_vector){0} + (int16_t)(with->dtype == DTYPE_F16 ? 0xfc00 : 0xff80); /* -inf */
    uint16_t ALIGNED some[HALF_GROUP];
    half_sums sums = no_halves();
    f32_counter n_before = f32_no_count();
    half_vector number;
    for (int i = 0; i < LANES; i++)
        number[i] = (int16_t)i;
    for (int j = 0; j < HALF_GROUP; j += LANES, number += LANES) {
        half_vector out = (number < (int16_t)from) | (number == (int16_t)top);
        half_vector kept = (half_load(x + c + j) & ~out) | (none & out);
        memcpy(some + j, &kept, sizeof kept);
    }
    for (int j = 0; j < HALF_GROUP; j += 2 * f32_LANES) {
        f32_vector e[2];
        load_halves_f32(with->dtype, some + j, e, e + 1);
        for (int k = 0; k < 2; k++)
            e[k] = f32_max(with->scale.floor, e[k]);
        add_exps(with, e, half_bound(with, c), &sums, &n_before);
    }
    add_half_sums(row, with, &sums, n_before);
}

/* Add n_groups whole groups from number c of the chunk on; as many of what follows are swept. */
INLINE void sum_halves(row_statistics *row, const half_summing *with, const uint16_t *x, ptrdiff_t c,
                       ptrdiff_t n_groups, half_following *following)
{
    half_sums sums = no_halves();
    f32_counter n_before = f32_no_count();
    half_sweep sweep = following->sweep;
    ptrdiff_t last = c + n_groups * HALF_GROUP;
    const distances behind = in_order;
    while (c < last) {
        half_sums chain = no_halves();
        ptrdiff_t end = last - c < HALF_SPAN ? last : c + HALF_SPAN;
        const uint16_t *ahead = sweep_ahead(following, end - c);
#pragma GCC unroll 1
        for (; c < end; c += HALF_GROUP, ahead += HALF_GROUP) {
            fetch_ahead(ahead, 2 * HALF_GROUP, behind);
            sweep_group(&sweep, ahead);
            f32_vector bound = half_bound(with, c);
            for (int j = 0; j < HALF_GROUP; j += 2 * f32_LANES) {
                f32_vector e[2];
                load_halves_f32(with->dtype, x + c + j, e, e + 1);
                add_exps(with, e, bound, &chain, &n_before);
            }
        }
        sums.sum[0] += chain.sum[0] + chain.sum[1];
        sums.square[0] += chain.square[0] + chain.square[1];
        sums.spread[0] += chain.spread[0] + chain.spread[1];
    }
    following->sweep = sweep;
    add_half_sums(row, with, &sums, n_before);
}

/* Functions of their own, so that each has the registers to itself */
#define SUM_HALVES(name, code, has_figures, ranks)                                                 \
    static __attribute__((noinline)) void name(row_statistics *row, const f32_ranking *ranking,    \
                                               const uint16_t *x, ptrdiff_t c, ptrdiff_t n_groups, \
                                               half_following *next)                               \
    {                                                                                              \
        const half_summing with = summing_halves(code, row, has_figures, ranks ? ranking : NULL);  \
        sum_halves(row, &with, x, c, n_groups, next);                                              \
    }
SUM_HALVES(sum_bfloats, DTYPE_BF16, 0, 0)
SUM_HALVES(sum_float16s, DTYPE_F16, 0, 0)
SUM_HALVES(sum_bfloat_figures, DTYPE_BF16, 1, 1)
SUM_HALVES(sum_float16_figures, DTYPE_F16, 1, 1)
SUM_HALVES(sum_bfloat_figures_behind, DTYPE_BF16, 1, 0)
SUM_HALVES(sum_float16_figures_behind, DTYPE_F16, 1, 0)
#undef SUM_HALVES

/* What comes before the label beside the logits above it: a top that is left out of the sums, at its number
 * in the chunk or -1, and the label's equals in its own group */
static void rank_halves(row_statistics *row, dtype_code dtype, const f32_ranking *ranking, const uint16_t *x,
                        ptrdiff_t n, ptrdiff_t top)
{
    ptrdiff_t first = ranking->label / HALF_GROUP * HALF_GROUP;
    if (top >= 0)
        row->n_before += row->largest > ranking->logit;
    for (ptrdiff_t c = first; ranking->label >= 0 && ranking->label < n && c < ranking->label; c++)
        row->n_before += half_value(dtype, x[c]) == ranking->logit;
    if (top >= 0 && top < first)
        row->n_before += row->largest == ranking->logit;
}

/* Of a row of fewer classes too much is its ends and its largest: it is converted to float32 as a whole. */
enum { HALF_CLASSES = 512 };

/* Add a chunk to the row, if it is of this kind; returns whether it was. `next` is it, what was swept of it,
 * and then the n_next logits to come. `ranking` is NULL where no figures are wanted. */
static int add_halves(row_statistics *row, dtype_code dtype, const char *logits, ptrdiff_t n,
                      ptrdiff_t first_class, const char *next_logits, ptrdiff_t n_next, half_following *next,
                      const f32_ranking *ranking)
{
    const uint16_t *x = (const uint16_t *)(const void *)logits;
    ptrdiff_t top = -1;
#ifndef VECTOR_X86
    if (dtype == DTYPE_F16)
        return 0;
#endif
    if (n < HALF_GROUP)
        return 0;
    if (next->x != x)
        *next = following(x, n);
    half_range range = range_of_halves(next);
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
    *next = n_next >= HALF_SPAN ? following((const uint16_t *)(const void *)next_logits, n_next)
                                : following(x, n);
    /* No class comes before the label's where it is the largest itself, or larger. */
    int has_figures = ranking != NULL;
    if (ranking && (largest < ranking->logit || (top >= 0 && top == ranking->label)))
        ranking = NULL;
    static void (*const sums[2][3])(row_statistics *, const f32_ranking *, const uint16_t *, ptrdiff_t,
                                    ptrdiff_t, half_following *) = {
        {sum_bfloats, sum_bfloat_figures_behind, sum_bfloat_figures},
        {sum_float16s, sum_float16_figures_behind, sum_float16_figures}};
    void (*sum)(row_statistics *, const f32_ranking *, const uint16_t *, ptrdiff_t, ptrdiff_t,
                half_following *) = sums[dtype == DTYPE_F16][has_figures + (ranking != NULL)];
    const half_summing with = summing_halves(dtype, row, has_figures, ranking);
    ptrdiff_t n_groups = n / HALF_GROUP, rest = n % HALF_GROUP;
    ptrdiff_t whole = top >= 0 && top / HALF_GROUP < n_groups ? top / HALF_GROUP : n_groups;
    sum(row, ranking, x, 0, whole, next);
    if (whole < n_groups) {
        sum_some_halves(row, &with, x, whole * HALF_GROUP, 0, top % HALF_GROUP);
        sum(row, ranking, x, (whole + 1) * HALF_GROUP, n_groups - whole - 1, next);
    }
    if (rest)
        sum_some_halves(row, &with, x, n - HALF_GROUP, HALF_GROUP - rest, top - (n - HALF_GROUP));
    if (ranking)
        rank_halves(row, dtype, ranking, x, n, top);
    if (n_next < HALF_SPAN)
        next->x = NULL;
    return 1;
}
