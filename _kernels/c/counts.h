/* Rows counted once their loss and figures are known, as an evaluation keeps them; included in float64 only.
 *
 * Rows that count are gathered in a tile, side by side. What follows from them by arithmetic goes by vectors,
 * numbers of bins among it. Then row after row is put into its bins, into copies of them in turn, as an
 * addition waits for the one before it to the same place.
 */

enum { COUNT_TILE = 512, TILE_ROOM = COUNT_TILE + f64_QUAD, COPIES = 4 };

/* Columns of a tile; first those of which there are moments */
enum { PROBABILITY = N_MOMENTS, ROW_RANK, OTHERS, OUTCOME, LOGIT, COLUMNS };
/* A row's bins: that of its probability by PROBABILITY_BINS + 1 later where it came true, that of its rank or
 * logit */
enum { LOSS_BIN, PROBABILITY_BIN, RANK_BIN, BIN_COLUMNS, OUTCOME_BINS = 2 * (PROBABILITY_BINS + 1) };

typedef struct {
    int64_t losses[LOSS_BINS], ranks[RANK_BINS], n[OUTCOME_BINS];
    double probability[OUTCOME_BINS], soft_outcome[OUTCOME_BINS];
} count_bins;

typedef struct {
    ptrdiff_t n;
    double ALIGNED column[COLUMNS][TILE_ROOM];
    int64_t ALIGNED bin[BIN_COLUMNS][TILE_ROOM];
    count_bins copies[COPIES];
} counting;

/* exp(x) - 1 of x <= 0, with all digits near 0, too: 2^n*(2^f - 1) + (2^n - 1) */
INLINE f64_vector expm1_nonpositive(f64_vector x)
{
    enum { TERMS = sizeof f64_exp2_fine_terms / sizeof(double) - 1 }; /* all but the last are f times these */
    f64_vector shifted, f = f64_max(f64_all(-60), x);
    f64_exp_scale scale = f64_exp_scale_of(f64_all(0));
    f64_exp_rounded(&f, &shifted, 1, &scale, 0);
    f64_vector power = (f64_vector)((f64_ivector)shifted << MANTISSA_BITS), quotient = f;
    f64_polynomial(f64_exp2_fine_terms, TERMS, &quotient, 1);
    return f64_fma(power * quotient, f, power - 1);
}

/* To the tile the rows that count of n from `first` on, with 0 behind them */
static void gather_rows(const count_job *job, ptrdiff_t first, ptrdiff_t n, counting *tile)
{
    double (*column)[TILE_ROOM] = tile->column;
    uint8_t is_live[COUNT_TILE];
    const array_view *views[] = {&job->loss, &job->logits, &job->target};
    const int to[] = {LOSS_MOMENT, LOGIT, OUTCOME};
    for (int k = 0; k < (job->logits.data ? 3 : 1); k++) {
        const double *items = f64_items(views[k], first, n, column[to[k]]);
        if (items != column[to[k]])
            memcpy(column[to[k]], items, sizeof(double) * (size_t)n);
    }
    const distances behind = in_order;
    for (ptrdiff_t i = 0; job->figures && i < n; i++) {
        const double *row = job->figures + FIGURES * (first + i);
        fetch_ahead(row, FIGURES * (ptrdiff_t)sizeof(double), behind);
        column[ROW_RANK][i] = row[RANK];
        column[CONFIDENCE_MOMENT][i] = row[TOP_PROBABILITY];
        column[ENTROPY_MOMENT][i] = row[ENTROPY_OF_ROW];
        column[OTHERS][i] = row[OTHERS_SQUARED];
    }
    const double *mark = job->figures ? column[ROW_RANK] : job->logits.data ? column[OUTCOME] : NULL;
    double dead = job->figures ? 0 : job->ignored;
    tile->n = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        is_live[i] = (!job->counted || job->counted[first + i]) & !(mark && mark[i] == dead);
        tile->n += is_live[i];
    }
    for (int c = 0; c < COLUMNS; c++) {
        for (ptrdiff_t i = 0, at = 0; tile->n < n && i < n; at += is_live[i++])
            column[c][at] = column[c][i];
        for (int i = 0; i < f64_QUAD; i++)
            column[c][tile->n + i] = 0;
    }
}

/* The integers that doubles of 0 and above are */
INLINE void store_bins(int64_t *to, f64_vector number)
{
    f64_ivector bins = (f64_ivector)(number + MAGIC) - (f64_ivector)f64_all(MAGIC);
    memcpy(to, &bins, sizeof bins);
}

/* x from `low` on and up to `high`, which NaN is, too */
INLINE f64_vector clamped(f64_vector x, double low, double high)
{
    return f64_max(f64_all(low), f64_min(x, f64_all(high)));
}

/* The bin whose upper end is the first not below p, counted from 1; 0 for 0 */
INLINE void store_probability_bins(int64_t *to, f64_vector p, f64_mask came_true)
{
    const f64_vector one = f64_all(1);
    f64_vector end = clamped(p * PROBABILITY_BINS, 0, PROBABILITY_BINS), whole = (end + MAGIC) - MAGIC;
    whole += f64_keep(f64_greater(end, whole), one);
    store_bins(to, whole + f64_keep(came_true, f64_all(PROBABILITY_BINS + 1)));
}

static void find_loss_bins(counting *tile)
{
    const double ends[] = {0x1.cp-21, 0x1p10}; /* a number of the first bin, and of the last */
    for (ptrdiff_t i = 0; i < tile->n; i += f64_LANES) {
        f64_vector loss = clamped(f64_load(tile->column[LOSS_MOMENT] + i), ends[0], ends[1]);
        f64_ivector bins = ((f64_ivector)loss >> LOSS_BIN_SHIFT) - (LOSS_BIN_FIRST - 1);
        memcpy(tile->bin[LOSS_BIN] + i, &bins, sizeof bins);
    }
}

/* From the figures of rows to what there are moments of, and to bins */
static void derive_classes(counting *tile)
{
    double (*column)[TILE_ROOM] = tile->column;
    const f64_vector one = f64_all(1);
    for (ptrdiff_t i = 0; i < tile->n; i += f64_LANES) {
        /* p - 1 of the label keeps its relative precision. The squares of the other classes are those of all
         * but the top; of a miss the top is one of them, and the label is not. */
        f64_vector rank = f64_load(column[ROW_RANK] + i), top = f64_load(column[CONFIDENCE_MOMENT] + i);
        f64_vector missing = expm1_nonpositive(-f64_load(column[LOSS_MOMENT] + i)), p = missing + one;
        f64_mask is_hit = f64_equal(rank, one);
        f64_vector squares = missing * missing + f64_load(column[OTHERS] + i);
        squares += f64_drop(is_hit, (top - p) * (top + p));
        f64_store(column[SQUARES_MOMENT] + i, squares);
        f64_store(column[RECIPROCAL_MOMENT] + i, one / rank);
        store_probability_bins(tile->bin[PROBABILITY_BIN] + i, top, is_hit);
        store_bins(tile->bin[RANK_BIN] + i, clamped(rank, 0, RANK_BINS - 1));
    }
    memcpy(column[PROBABILITY], column[CONFIDENCE_MOMENT], sizeof column[PROBABILITY]);
}

/* From logits and labels between 0 and 1 to squared errors and bins */
static void derive_binary(counting *tile, row_counts *found)
{
    double (*column)[TILE_ROOM] = tile->column;
    const f64_vector one = f64_all(1), zero = f64_all(0), half = f64_all(0.5);
    ptrdiff_t n_hard = 0;
    for (ptrdiff_t i = 0; i < tile->n; i += f64_QUAD) {
        f64_vector e[4];
        for (int j = 0; j < 4; j++)
            e[j] = -f64_abs(f64_load(column[LOGIT] + i + j * f64_LANES));
        f64_exp_nonpositive(e, 0);
        for (int j = 0; j < 4; j++) {
            ptrdiff_t at = i + j * f64_LANES;
            f64_vector x = f64_load(column[LOGIT] + at), y = f64_load(column[OUTCOME] + at);
            f64_mask above = f64_greater(x, zero), is_positive = f64_greater(y, half);
            f64_vector share = one / (one + e[j]), other = e[j] * share;
            f64_vector p = f64_choose(above, share, other), rest = f64_choose(above, other, share);
            f64_vector error = p * (one - y) - rest * y;
            f64_store(column[SQUARES_MOMENT] + at, error * error);
            f64_store(column[PROBABILITY] + at, p);
            store_probability_bins(tile->bin[PROBABILITY_BIN] + at, p, is_positive);
            f64_vector place = clamped(x * RANKING_BINS_PER_LOGIT + RANKING_BINS / 2, 0, RANKING_BINS - 1);
            f64_vector whole = (place + MAGIC) - MAGIC;
            whole -= f64_keep(f64_greater(whole, place), one);
            store_bins(tile->bin[RANK_BIN] + at, whole + f64_keep(is_positive, f64_all(RANKING_BINS)));
        }
    }
    for (ptrdiff_t i = 0; i < tile->n; i++) {
        double x = column[LOGIT][i], y = column[OUTCOME][i];
        found->correct += (x > 0) == (y > 0.5);
        found->n_bad += !((y >= 0) & (y <= 1));
        n_hard += (y == 0) | (y == 1);
    }
    for (ptrdiff_t i = 0; n_hard < tile->n && i < tile->n; i++) { /* else the bin says what came true */
        double y = column[OUTCOME][i];
        tile->copies->soft_outcome[tile->bin[PROBABILITY_BIN][i]] += y - (y > 0.5);
    }
}

static void put_in_bins(const count_job *job, counting *tile, uint32_t *ranking)
{
    const int64_t *bin = tile->bin[LOSS_BIN];
    for (ptrdiff_t i = 0; i < tile->n; i++)
        tile->copies[i % COPIES].losses[bin[i]]++;
    if (!job->figures && !job->logits.data)
        return;
    bin = tile->bin[PROBABILITY_BIN];
    for (ptrdiff_t i = 0; i < tile->n; i++) {
        count_bins *bins = tile->copies + i % COPIES;
        bins->n[bin[i]]++;
        bins->probability[bin[i]] += tile->column[PROBABILITY][i];
    }
    const int64_t *rank = tile->bin[RANK_BIN];
    for (ptrdiff_t i = 0; job->figures && i < tile->n; i++)
        tile->copies[i % COPIES].ranks[rank[i]]++;
    for (ptrdiff_t i = 0; job->logits.data && i < tile->n; i++)
        ranking[rank[i]]++;
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

static double sum_of(const double *column, ptrdiff_t n)
{
    f64_vector sum[4] = {f64_all(0), f64_all(0), f64_all(0), f64_all(0)};
    for (ptrdiff_t i = 0; i < n; i += f64_QUAD)
        for (int j = 0; j < 4; j++)
            sum[j] += f64_load(column + i + j * f64_LANES);
    return f64_lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static double deviations_of(double *column, ptrdiff_t n, double mean)
{
    f64_vector sum[4] = {f64_all(0), f64_all(0), f64_all(0), f64_all(0)};
    for (int i = 0; i < f64_QUAD; i++)
        column[n + i] = mean;
    for (ptrdiff_t i = 0; i < n; i += f64_QUAD)
        for (int j = 0; j < 4; j++) {
            f64_vector around = f64_load(column + i + j * f64_LANES) - f64_all(mean);
            sum[j] = f64_fma(around, around, sum[j]);
        }
    return f64_lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* Move what is finite to the front, with 0 behind; returns how many are. */
static ptrdiff_t drop_infinite(double *column, ptrdiff_t n)
{
    ptrdiff_t n_finite = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        column[n_finite] = column[i];
        n_finite += column[i] != INFINITY;
    }
    for (ptrdiff_t i = n_finite; i < n; i++)
        column[i] = 0;
    return n_finite;
}

/* The numbers of a column, which has 0 behind them, but for infinite losses */
static void add_moments(moments *to, double *column, ptrdiff_t n)
{
    double sum = sum_of(column, n);
    if (sum == INFINITY) {
        n = drop_infinite(column, n);
        sum = sum_of(column, n);
    }
    double mean = n ? sum / (double)n : 0;
    merge_moments(to, &(moments){n, {sum, 0}, {deviations_of(column, n, mean), 0}});
}

static void count_tile(const count_job *job, counting *tile, row_counts *found, uint32_t *ranking)
{
    int n_moments = job->figures ? N_MOMENTS : job->logits.data ? SQUARES_MOMENT + 1 : LOSS_MOMENT + 1;
    find_loss_bins(tile);
    if (job->figures)
        derive_classes(tile);
    else if (job->logits.data)
        derive_binary(tile, found);
    put_in_bins(job, tile, ranking);
    found->counted += tile->n;
    for (int k = 0; k < n_moments; k++) {
        double *column = tile->column[k];
        for (int i = 0; i < f64_QUAD; i++)
            column[tile->n + i] = 0;
        add_moments(found->moments + k, column, tile->n);
    }
}

/* Count a block of rows; of binary labels add logits to `ranking`, which is the thread's. */
static void count_block(const count_job *job, ptrdiff_t block, uint32_t *ranking, row_counts *found)
{
    counting tile;
    FRESH(tile);
    ptrdiff_t first = block * COUNT_ROWS, end = first + COUNT_ROWS;
    end = end < job->n_rows ? end : job->n_rows;
    memset(tile.copies, 0, sizeof tile.copies);
    memset(found, 0, sizeof *found);
    for (ptrdiff_t n; first < end; first += n) {
        n = end - first < COUNT_TILE ? end - first : COUNT_TILE;
        gather_rows(job, first, n, &tile);
        count_tile(job, &tile, found, ranking);
    }
    for (int k = 0; k < COPIES; k++) {
        const count_bins *bins = tile.copies + k;
        for (int i = 0; i < RANK_BINS; i++)
            found->ranks[i] += bins->ranks[i];
        for (int i = 0; i < LOSS_BINS; i++)
            found->losses[i] += bins->losses[i];
        for (int i = 0; i < OUTCOME_BINS; i++) {
            int came_true = i > PROBABILITY_BINS, number = i - came_true * (PROBABILITY_BINS + 1);
            int bin = number > 0 ? number - 1 : 0; /* the first has 0, too */
            found->n[bin] += bins->n[i];
            add(found->probability + bin, bins->probability[i]);
            add(found->outcome + bin, (double)(came_true * bins->n[i]) + bins->soft_outcome[i]);
        }
    }
    if (job->figures)
        found->correct = found->ranks[1];
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
