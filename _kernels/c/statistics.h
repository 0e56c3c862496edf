/* What a pass over rows leaves of them, how two parts of a row merge, and what follows for loss and gradient.
 *
 * The largest logit (first of equals) stays apart, so that a loss keeps its relative precision however far it
 * is ahead. Of the others there are
 *
 *  - sum, of e = exp(x - shift) * 2^-exponent,
 *  - weight, of gamma,
 *  - gap, of gamma*(largest - x), with 0 in place of a largest of -inf,
 *
 * where shift is 0 (the largest, if it is beyond DIRECT) and exponent an integer: raising it as larger logits
 * come scales the sum exactly, wherever the logits stand. In a row with NaN the sum is NaN. Where a row's
 * figures are wanted, there are square, the sum of e^2, and spread, that of e*(largest - x), too, and of all
 * classes the number that come before the label's.
 */
typedef struct {
    double largest, shift, exponent, top_weight;
    compensated sum, weight, gap, square, spread;
    ptrdiff_t top, n_before;
} row_statistics;

/* Where a chunk's exponentials were kept: what they are scaled by, which a later chunk may have changed.
 * Before the first logit above -inf all are 0, and the exponent is infinite. */
typedef struct {
    double shift, exponent;
} chunk_scale;

INLINE void add_all(compensated *total, const compensated *more)
{
    add(total, more->sum);
    total->lost += more->lost;
}

INLINE void multiply(compensated *total, double factor)
{
    total->sum *= factor;
    total->lost *= factor;
}

/* 0 times anything is 0. */
INLINE double times(double factor, double x) { return factor != 0 ? factor * x : 0; }

/* A row of no classes yet; item by item, as a compiler may do the whole at a byte's pace */
INLINE void begin(row_statistics *row)
{
    const compensated zero = {0, 0};
    row->largest = -INFINITY;
    row->shift = row->exponent = row->top_weight = 0;
    row->sum = row->weight = row->gap = row->square = row->spread = zero;
    row->top = row->n_before = 0;
}

/* What the second pass needs of one row: an entry is p*factor - gamma*gamma_factor, p = exp(x -
 * shift)*2^-exponent, but for the label's and the largest's. */
typedef struct {
    double factor, shift, exponent, gamma_factor, largest, log1p_others;
    double at_top, at_label;
    ptrdiff_t top, label; /* -1 where there is none */
    int is_live;
} finished_row;

_Static_assert(sizeof(row_statistics) <= PART_BYTES && sizeof(finished_row) <= PART_BYTES, "PART_BYTES");

/* What loss and second pass need of a row: p = exp(x - shift)*2^-exponent*factor. */
typedef struct {
    double lse[BLOCK_ROWS], log1p_others[BLOCK_ROWS], p_top[BLOCK_ROWS], p_others[BLOCK_ROWS];
    double factor[BLOCK_ROWS], shift[BLOCK_ROWS], exponent[BLOCK_ROWS];
} row_softmax;

/* 2^n, 0 where that is no normal number */
INLINE double power_of_2(double n)
{
    int64_t bits = n > -1023 ? (int64_t)(n < 1023 ? n : 1023) + 1023 : 0;
    double power;
    bits = (int64_t)((uint64_t)bits << 52);
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* What a rounded logarithm lacks of its base's, where that is e */
#ifdef VECTOR_FMA
#define LOG2_BASE_LOW 0.0
#else
#define LOG2_BASE_LOW 0x1.777d0ffda0d24p-56
#endif

/* exp(x - shift)*2^-exponent of one number; 0 when that is negligible */
INLINE double exp_relative(double x, double shift, double exponent, double log2_base)
{
    double n = rint((x - shift) * log2_base);
    double fraction = fma(x - shift, log2_base, -n) + (x - shift) * LOG2_BASE_LOW;
    double power = power_of_2(n - exponent); /* far beyond 0 the fraction is any number */
    return power == 0 ? 0 : power * (x == shift ? 1 : exp2(fraction));
}

INLINE double finite_or_0(double x) { return x > -INFINITY ? x : 0; }

/* `into`, then `from`, whose classes come later: the whole of both, in `into`. */
static void merge(row_statistics *into, const row_statistics *from, double log2_base)
{
    row_statistics high = *into, low = *from;
    if (from->largest > into->largest) {
        high = *from;
        low = *into;
    }
    high.n_before += low.n_before;
    *into = high;
    if (!isfinite(high.largest)) {
        add(&into->sum, isnan(low.sum.sum) ? NAN : 0);
        return;
    }
    if (low.sum.sum != 0) {
        double factor = exp_relative(low.shift, high.shift, high.exponent - low.exponent, log2_base);
        multiply(&low.sum, factor);
        multiply(&low.spread, factor);
        multiply(&low.square, factor * factor);
        add_all(&high.sum, &low.sum);
        add_all(&high.spread, &low.spread);
        add(&high.spread, times(value_of(&low.sum), high.largest - low.largest));
        add_all(&high.square, &low.square);
    }
    double rise = value_of(&low.weight) * (high.largest - finite_or_0(low.largest));
    add_all(&high.gap, &low.gap);
    add_all(&high.weight, &low.weight);
    add(&high.gap, rise);
    if (low.largest > -INFINITY) {
        double e = exp_relative(low.largest, high.shift, high.exponent, log2_base);
        add(&high.sum, e);
        add(&high.spread, times(e, high.largest - low.largest));
        add(&high.square, e * e);
        add(&high.weight, low.top_weight);
        add(&high.gap, times(low.top_weight, high.largest - low.largest));
    }
    *into = high;
}

/* From the statistics of n rows to their softmax. A row that holds NaN or +inf, or -inf only, is poisoned:
 * its factor and logarithm are NaN. `headroom` is the second pass's: its largest exponential is about
 * 2^headroom. */
static void softmax_of(const row_statistics *statistics, ptrdiff_t n, double headroom, double log2_base,
                       row_softmax *softmax)
{
    double ALIGNED lane[5][f64_LANES];
    for (ptrdiff_t first = 0; first < n; first += f64_LANES) {
        for (int i = 0; i < f64_LANES; i++) {
            const row_statistics *row = statistics + (first + i < n ? first + i : n - 1);
            lane[0][i] = isfinite(row->largest) ? row->largest : 0;
            lane[1][i] = isfinite(row->largest) ? value_of(&row->sum) : NAN;
            lane[2][i] = row->shift;
            lane[3][i] = row->exponent;
            lane[4][i] = isnan(row->sum.sum) ? NAN : row->largest;
        }
        f64_vector largest = f64_load(lane[0]), sum = f64_load(lane[1]), shift = f64_load(lane[2]);
        f64_vector exponent = f64_load(lane[3]), lse_if_poisoned = f64_load(lane[4]);
        /* exp(shift - largest)*2^power = 2^(power - n)*2^-f, with (largest - shift)*log2_base = n + f */
        f64_vector above = largest - shift;
        f64_vector n_vector = f64_fma(above, f64_all(log2_base), f64_all(0x1.8p52)) - 0x1.8p52;
        f64_vector mantissa = f64_exp2_unit(-f64_fraction(above, n_vector, log2_base));
        f64_vector others = sum * f64_power_of_2(exponent - n_vector) * mantissa;
        f64_vector log1p_others = f64_log1p_nonnegative(others);
        f64_vector whole = others + 1.0;
        f64_vector lse = largest + log1p_others;
        lse = f64_choose(f64_greater(f64_all(INFINITY), lse), lse, lse_if_poisoned);
        f64_store(softmax->lse + first, lse);
        f64_store(softmax->log1p_others + first, log1p_others);
        f64_store(softmax->p_top + first, 1.0 / whole);
        f64_store(softmax->p_others + first, others / whole);
        f64_store(softmax->factor + first, mantissa * f64_power_of_2(f64_all(-headroom)) / whole);
        f64_store(softmax->shift + first, shift);
        f64_store(softmax->exponent + first, n_vector - headroom);
    }
}

/* The same where the caller knows lse: the largest logit plays no part. `shift` is lse as a real, or 0. */
static void softmax_from_lse(double lse, double shift, double headroom, double log2_base,
                             row_softmax *softmax, ptrdiff_t row)
{
    double n = rint((lse - shift) * log2_base);
    softmax->lse[row] = lse;
    softmax->shift[row] = isfinite(lse) ? shift : 0;
    softmax->exponent[row] = isfinite(lse) ? n - headroom : 0;
    softmax->factor[row] =
        isfinite(lse)
            ? power_of_2(-headroom) * exp2(-(fma(lse - shift, log2_base, -n) + (lse - shift) * LOG2_BASE_LOW))
            : NAN;
}
