/* What a pass over rows leaves of them, how two parts of a row merge, and what follows for loss and gradient.
 *
 * The largest logit (first of equals) stays apart, so that a loss keeps its relative precision however far it
 * is ahead. Of the others there are sum    = sum exp(x - shift) * 2^-exponent weight = sum gamma,   gap = sum
 * gamma*(largest - x)      (0 in place of a largest of -inf) where shift is 0 (the largest, if it is beyond
 * DIRECT) and exponent an integer: raising it as larger logits come scales the sum exactly, and no difference
 * x - largest is ever rounded before its exponential. In a row with NaN the sum is NaN.
 */
typedef struct {
    double sum, lost; /* to rounding: a rising row adds to its sums thousands of times */
} compensated;

typedef struct {
    double largest, sum, shift, exponent, top_weight;
    compensated weight, gap;
    ptrdiff_t top;
} row_statistics;

INLINE void add(compensated *total, double term)
{
    double sum = total->sum + term, added = sum - total->sum;
    if (isfinite(sum))
        total->lost += (total->sum - (sum - added)) + (term - added);
    total->sum = sum;
}

INLINE void add_all(compensated *total, const compensated *more)
{
    add(total, more->sum);
    total->lost += more->lost;
}

INLINE double value_of(const compensated *total) { return total->sum + total->lost; }

/* What loss and second pass need of a row: p = exp(x - shift)*2^-exponent*factor. */
typedef struct {
    double lse[BLOCK_ROWS], log1p_others[BLOCK_ROWS], p_top[BLOCK_ROWS], p_others[BLOCK_ROWS];
    double factor[BLOCK_ROWS], shift[BLOCK_ROWS], exponent[BLOCK_ROWS];
} row_softmax;

/* exp(x - shift)*2^-exponent of one number; 0 when that is negligible */
static double exp_relative(double x, double shift, double exponent)
{
    double n = rint((x - shift) * 0x1.71547652b82fep0);
    double r = ((x - shift) - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    return n - exponent > -3000 ? ldexp(exp(r), (int)(n - exponent)) : 0;
}

INLINE double finite_or_0(double x) { return x > -INFINITY ? x : 0; }

/* `into`, then `from`, whose classes come later: the whole of both, in `into`. */
static void merge(row_statistics *into, const row_statistics *from)
{
    row_statistics high = *into, low = *from;
    if (from->largest > into->largest) {
        high = *from;
        low = *into;
    }
    *into = high;
    if (!isfinite(high.largest)) {
        into->sum += isnan(low.sum) ? NAN : 0;
        return;
    }
    if (low.sum != 0)
        high.sum += low.sum * exp_relative(low.shift, high.shift, high.exponent - low.exponent);
    double rise = value_of(&low.weight) * (high.largest - finite_or_0(low.largest));
    add_all(&high.gap, &low.gap);
    add_all(&high.weight, &low.weight);
    add(&high.gap, rise);
    if (low.largest > -INFINITY) {
        high.sum += exp_relative(low.largest, high.shift, high.exponent);
        add(&high.weight, low.top_weight);
        add(&high.gap, low.top_weight != 0 ? low.top_weight * (high.largest - low.largest) : 0);
    }
    *into = high;
}

/* From the statistics of n rows to their softmax. A row that holds NaN or +inf, or -inf only, is poisoned:
 * its factor and logarithm are NaN. `headroom` is the second pass's: its largest exponential is about
 * 2^headroom. */
static void softmax_of(const row_statistics *statistics, ptrdiff_t n, double headroom, row_softmax *softmax)
{
    double ALIGNED lane[5][f64_LANES];
    for (ptrdiff_t first = 0; first < n; first += f64_LANES) {
        for (int i = 0; i < f64_LANES; i++) {
            const row_statistics *row = statistics + (first + i < n ? first + i : n - 1);
            lane[0][i] = isfinite(row->largest) ? row->largest : 0;
            lane[1][i] = isfinite(row->largest) ? row->sum : NAN;
            lane[2][i] = row->shift;
            lane[3][i] = row->exponent;
            lane[4][i] = isnan(row->sum) ? NAN : row->largest;
        }
        f64_vector largest = f64_load(lane[0]), sum = f64_load(lane[1]), shift = f64_load(lane[2]);
        f64_vector exponent = f64_load(lane[3]), lse_if_poisoned = f64_load(lane[4]);
        /* exp(shift - largest)*2^power = 2^(power - n)*exp(-r), with largest - shift = n*ln2 + r */
        f64_vector above = largest - shift;
        f64_vector n_vector = f64_fma(above, f64_all(0x1.71547652b82fep0), f64_all(0x1.8p52)) - 0x1.8p52;
        f64_vector mantissa = f64_exp_reduced(-f64_reduced(above, n_vector));
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

/* The same where the caller knows lse: the largest logit plays no part. */
static void softmax_from_lse(double lse, double direct, double headroom, row_softmax *softmax, ptrdiff_t row)
{
    double shift = fabs(lse) > direct ? lse : 0;
    double n = rint((lse - shift) * 0x1.71547652b82fep0);
    double r = ((lse - shift) - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    softmax->lse[row] = lse;
    softmax->shift[row] = isfinite(lse) ? shift : 0;
    softmax->exponent[row] = isfinite(lse) ? n - headroom : 0;
    softmax->factor[row] = isfinite(lse) ? ldexp(exp(-r), -(int)headroom) : NAN;
}
