/* Rows counted once their loss and figures are known, as an evaluation keeps them; included in float64 only.
 *
 * Rows that count are gathered in a tile, side by side. What follows from them by arithmetic goes by vectors;
 * what goes into bins, by one row after another, and into copies of the bins in turn, as an addition waits
 * for the one before it to the same place.
 */

enum { COUNT_TILE = 512, COPIES = 4 };

/* Columns of a tile; first those of which there are moments */
enum { PROBABILITY = N_MOMENTS, ROW_RANK, OTHERS, OUTCOME, LOGIT, COLUMNS };

typedef struct {
    int64_t ranks[RANK_BINS], losses[LOSS_BINS], n[PROBABILITY_BINS + 1];
    double probability[PROBABILITY_BINS + 1], outcome[PROBABILITY_BINS + 1];
} count_bins;

typedef struct {
    double ALIGNED column[COLUMNS][COUNT_TILE + f64_QUAD];
    double ALIGNED given[3][COUNT_TILE];
    count_bins copies[COPIES];
} counting;

/* exp(x) - 1 of x <= 0, with all digits near 0, too: 2^n*(2^f - 1) + (2^n - 1) */
INLINE f64_vector expm1_nonpositive(f64_vector x)
{
    enum { TERMS = sizeof f64_exp2_fine_terms / sizeof(double) - 1 }; /* all but the last are f times these */
    f64_vector shifted, f = f64_max(f64_all(-60), x);
    f64_exp_rounded(&f, &shifted, 1, f64_exp_scale_of(f64_all(0)));
    f64_vector power = (f64_vector)((f64_ivector)shifted << MANTISSA_BITS), quotient = f;
    f64_polynomial(f64_exp2_fine_terms, TERMS, &quotient, 1);
    return f64_fma(power * quotient, f, power - 1);
}

/* The rows that count of n from `first` on, with 0 behind them; returns how many. */
static ptrdiff_t gather_rows(const count_job *job, ptrdiff_t first, ptrdiff_t n, counting *tile)
{
    double(*column)[COUNT_TILE + f64_QUAD] = tile->column;
    const double *loss = f64_items(&job->loss, first, n, tile->given[0]);
    const double *logit = NULL, *target = NULL;
    ptrdiff_t n_live = 0;
    if (job->logits.data) {
        logit = f64_items(&job->logits, first, n, tile->given[1]);
        target = f64_items(&job->target, first, n, tile->given[2]);
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        int is_live = !job->counted || job->counted[first + i];
        column[LOSS_MOMENT][n_live] = loss[i];
        if (job->figures) {
            const double *row = job->figures + FIGURES * (first + i);
            column[ROW_RANK][n_live] = row[RANK];
            column[CONFIDENCE_MOMENT][n_live] = row[TOP_PROBABILITY];
            column[ENTROPY_MOMENT][n_live] = row[ENTROPY_OF_ROW];
            column[OTHERS][n_live] = row[OTHERS_SQUARED];
        } else if (logit) {
            is_live &= target[i] != job->ignored;
            column[LOGIT][n_live] = logit[i];
            column[OUTCOME][n_live] = target[i];
        }
        n_live += is_live;
    }
    for (int c = 0; c < COLUMNS; c++)
        for (ptrdiff_t i = n_live; i < n_live + f64_QUAD; i++)
            column[c][i] = 0;
    return n_live;
}

/* From the figures of rows to what there are moments of, and hits */
static void derive_classes(ptrdiff_t n, counting *tile)
{
    double(*column)[COUNT_TILE + f64_QUAD] = tile->column;
    const f64_vector one = f64_all(1);
    for (ptrdiff_t i = 0; i < n; i += f64_LANES) {
        /* p - 1 of the label keeps its relative precision. The squares of the other classes are those of all
         * but the top; of a miss the top is one of them, and the label is not. */
        f64_vector rank = f64_load(column[ROW_RANK] + i), top = f64_load(column[CONFIDENCE_MOMENT] + i);
        f64_vector missing = expm1_nonpositive(-f64_load(column[LOSS_MOMENT] + i)), p = missing + one;
        f64_mask is_hit = f64_equal(rank, one);
        f64_vector squares = missing * missing + f64_load(column[OTHERS] + i);
        squares += f64_drop(is_hit, (top - p) * (top + p));
        f64_store(column[SQUARES_MOMENT] + i, squares);
        f64_store(column[RECIPROCAL_MOMENT] + i, one / rank);
        f64_store(column[PROBABILITY] + i, top);
        f64_store(column[OUTCOME] + i, f64_keep(is_hit, one));
    }
}

/* From logits and labels between 0 and 1 */
static void derive_binary(ptrdiff_t n, counting *tile)
{
    double(*column)[COUNT_TILE + f64_QUAD] = tile->column;
    const f64_vector one = f64_all(1), zero = f64_all(0);
    for (ptrdiff_t i = 0; i < n; i += f64_QUAD) {
        f64_vector e[4];
        for (int j = 0; j < 4; j++)
            e[j] = -f64_abs(f64_load(column[LOGIT] + i + j * f64_LANES));
        f64_exp_nonpositive(e, 0);
        for (int j = 0; j < 4; j++) {
            ptrdiff_t at = i + j * f64_LANES;
            f64_vector x = f64_load(column[LOGIT] + at), y = f64_load(column[OUTCOME] + at);
            f64_mask above = f64_greater(x, zero);
            f64_vector share = one / (one + e[j]), other = e[j] * share;
            f64_vector p = f64_choose(above, share, other), rest = f64_choose(above, other, share);
            f64_vector error = p * (one - y) - rest * y;
            f64_store(column[SQUARES_MOMENT] + at, error * error);
            f64_store(column[PROBABILITY] + at, p);
        }
    }
}

INLINE int64_t loss_bin(double loss)
{
    int64_t bin;
    memcpy(&bin, &loss, sizeof bin);
    bin = (bin >> LOSS_BIN_SHIFT) - (LOSS_BIN_FIRST - 1);
    return bin < 0 ? 0 : bin < LOSS_BINS ? bin : LOSS_BINS - 1;
}

/* The bin whose upper end is the first not below p, counted from 1; 0 for 0 */
INLINE int probability_bin(double p)
{
    double end = p * PROBABILITY_BINS;
    int below = end > 0 && end < PROBABILITY_BINS ? (int)end : end > 0 ? PROBABILITY_BINS : 0;
    return below + (below < end && below < PROBABILITY_BINS);
}

INLINE int ranking_bin(double logit)
{
    double place = logit * RANKING_BINS_PER_LOGIT + RANKING_BINS / 2;
    return place > 0 ? place < RANKING_BINS ? (int)place : RANKING_BINS - 1 : 0; /* NaN has 0 */
}

static void put_in_bins(const count_job *job, ptrdiff_t n, counting *tile, row_counts *found,
                        uint32_t *ranking)
{
    const double(*column)[COUNT_TILE + f64_QUAD] = (const double(*)[COUNT_TILE + f64_QUAD])tile->column;
    for (ptrdiff_t i = 0; i < n; i++)
        tile->copies[i % COPIES].losses[loss_bin(column[LOSS_MOMENT][i])]++;
    if (!job->figures && !job->logits.data)
        return;
    for (ptrdiff_t i = 0; i < n; i++) {
        count_bins *bins = tile->copies + i % COPIES;
        double p = column[PROBABILITY][i], outcome = column[OUTCOME][i];
        int bin = probability_bin(p);
        bins->n[bin]++;
        bins->probability[bin] += p;
        bins->outcome[bin] += outcome;
    }
    for (ptrdiff_t i = 0; job->figures && i < n; i++) {
        double rank = column[ROW_RANK][i];
        tile->copies[i % COPIES].ranks[rank >= 0 && rank < RANK_BINS ? (int)rank : RANK_BINS - 1]++;
        found->correct += rank == 1;
    }
    for (ptrdiff_t i = 0; job->logits.data && i < n; i++) {
        double x = column[LOGIT][i], y = column[OUTCOME][i];
        int is_positive = y > 0.5;
        ranking[ranking_bin(x) + is_positive * RANKING_BINS]++;
        found->correct += (x > 0) == is_positive;
        found->n_bad += !(y >= 0 && y <= 1);
    }
}

/* The numbers that another has seen, too (Chan) */
static void merge_moments(moments *into, const moments *from)
{
    if (into->n && from->n) {
        double gap = value_of(&from->total) / (double)from->n - value_of(&into->total) / (double)into->n;
        double share = (double)into->n / (double)(into->n + from->n);
        add(&into->deviations, gap * gap * share * (double)from->n);
    }
    into->n += from->n;
    add_all(&into->total, &from->total);
    add_all(&into->deviations, &from->deviations);
}

static void add_moments(moments *to, const double *column, ptrdiff_t n)
{
    f64_vector sum = f64_all(0), squares = f64_all(0);
    for (ptrdiff_t i = 0; i < n; i += f64_LANES)
        sum += f64_load(column + i);
    moments of_tile = {.n = n, .total = {f64_lanes_sum(sum), 0}};
    f64_vector mean = f64_all(n ? of_tile.total.sum / (double)n : 0);
    for (ptrdiff_t i = 0; i < n; i += f64_LANES) {
        f64_vector around = f64_load(column + i) - mean;
        if (n - i < f64_LANES)
            around = f64_keep(f64_greater(f64_all((double)(n - i)), f64_numbers()), around);
        squares = f64_fma(around, around, squares);
    }
    of_tile.deviations.sum = f64_lanes_sum(squares);
    merge_moments(to, &of_tile);
}

/* Infinite losses are counted, and have no part in the mean. */
static ptrdiff_t drop_infinite(double *loss, ptrdiff_t n)
{
    ptrdiff_t n_finite = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        loss[n_finite] = loss[i];
        n_finite += loss[i] != INFINITY;
    }
    for (ptrdiff_t i = n_finite; i < n; i++)
        loss[i] = 0;
    return n_finite;
}

static void count_tile(const count_job *job, ptrdiff_t n, counting *tile, row_counts *found,
                       uint32_t *ranking)
{
    if (job->figures)
        derive_classes(n, tile);
    else if (job->logits.data)
        derive_binary(n, tile);
    put_in_bins(job, n, tile, found, ranking);
    found->counted += n;
    int n_moments = job->figures ? N_MOMENTS : job->logits.data ? SQUARES_MOMENT + 1 : 1;
    for (int k = SQUARES_MOMENT; k < n_moments; k++) {
        for (ptrdiff_t i = n; i < n + f64_LANES; i++)
            tile->column[k][i] = 0;
        add_moments(found->moments + k, tile->column[k], n);
    }
    add_moments(found->moments + LOSS_MOMENT, tile->column[LOSS_MOMENT],
                drop_infinite(tile->column[LOSS_MOMENT], n));
}

/* Count a block of rows; of binary labels add logits to `ranking`, which is the thread's. */
static void count_block(const count_job *job, ptrdiff_t block, uint32_t *ranking, row_counts *found)
{
    counting tile;
    ptrdiff_t first = block * COUNT_ROWS, end = first + COUNT_ROWS;
    end = end < job->n_rows ? end : job->n_rows;
    memset(tile.copies, 0, sizeof tile.copies);
    memset(found, 0, sizeof *found);
    for (ptrdiff_t n; first < end; first += n) {
        n = end - first < COUNT_TILE ? end - first : COUNT_TILE;
        count_tile(job, gather_rows(job, first, n, &tile), &tile, found, ranking);
    }
    for (int k = 0; k < COPIES; k++) {
        const count_bins *bins = tile.copies + k;
        for (int i = 0; i < RANK_BINS; i++)
            found->ranks[i] += bins->ranks[i];
        for (int i = 0; i < LOSS_BINS; i++)
            found->losses[i] += bins->losses[i];
        for (int i = 0; i <= PROBABILITY_BINS; i++) {
            int bin = i > 0 ? i - 1 : 0; /* the first has 0, too */
            found->n[bin] += bins->n[i];
            add(found->probability + bin, bins->probability[i]);
            add(found->outcome + bin, bins->outcome[i]);
        }
    }
}

static void merge_counts(row_counts *into, const row_counts *from)
{
    into->counted += from->counted;
    into->correct += from->correct;
    into->n_bad += from->n_bad;
    for (int i = 0; i < RANK_BINS; i++)
        into->ranks[i] += from->ranks[i];
    for (int i = 0; i < LOSS_BINS; i++)
        into->losses[i] += from->losses[i];
    for (int i = 0; i < PROBABILITY_BINS; i++) {
        into->n[i] += from->n[i];
        add_all(into->probability + i, from->probability + i);
        add_all(into->outcome + i, from->outcome + i);
    }
    for (int k = 0; k < N_MOMENTS; k++)
        merge_moments(into->moments + k, from->moments + k);
}
