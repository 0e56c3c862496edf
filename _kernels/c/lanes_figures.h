/* Rows side by side of which figures are wanted: their sums, and what they are told beside their losses;
 * included once for each real type.
 *
 * One sweep finds the largest logits and the labels'; another, of a vector of rows at a time, ranks the
 * labels' and then sums exponentials relative to the largest: `gap` is the sum of e*(largest - x), `weight`
 * that of e^2, both of all but the top. The two loops need fewer registers than one.
 */
#define V(name) PASTE(REAL, name)
#define FIGURES_AT_ONCE 64

/* The next larger number */
INLINE V(vector) V(next_above)(V(vector) x)
{
    V(ivector) bits = (V(ivector))(x + V(all)(0)); /* of -0 that of 0 */
    return (V(vector))(bits + (bits >> (8 * (int)sizeof(V(real)) - 1) | 1));
}

/* The largest logit and its class, first of equals, and the label's; the logits are copied to `tile`, if it
 * is not NULL, and meanwhile those to come are fetched, if `next` says which. */
INLINE void V(places_among)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, V(real) *tile,
                            int n_classes, ptrdiff_t first_class, V(fetch) next)
{
    const ptrdiff_t width = rows->width, tile_stride = V(tile_stride)(rows); /* which no store changes */
    for (ptrdiff_t lane = 0; lane < width; lane += V(LANES), x += V(LANES)) {
        V(ivector) top = first_class ? V(load_bits)(rows->top + lane) : V(all_bits)(0);
        V(vector) largest = first_class ? V(load)(rows->largest + lane) : V(all)(-INFINITY);
        V(vector) target = first_class ? V(load)(rows->target_logit + lane) : V(all)(0);
        V(ivector) label = V(load_bits)(rows->label + lane), number = V(all_bits)((V(bits))first_class);
        if (next.at)
            V(fetch_classes)(&next, lane, n_classes);
#pragma GCC unroll 8
        for (int c = 0; c < n_classes; c++, number += 1) {
            V(vector) logit = V(load)(x + c * x_stride);
            if (tile)
                V(store)(tile + c * tile_stride + lane, logit);
            top = V(choose_bits)(V(greater)(logit, largest), number, top);
            largest = V(max)(logit, largest);
            target = V(choose)(V(equal_bits)(label, number), logit, target);
        }
        V(store)(rows->largest + lane, largest);
        V(store)(rows->target_logit + lane, target);
        V(store)((V(real) *)(rows->top + lane), (V(vector))top);
    }
}

static void V(find_places)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, V(real) *tile,
                           ptrdiff_t n_classes, ptrdiff_t first_class, V(fetch) next)
{
#define PLACES_AMONG(n) \
    case n: V(places_among)(rows, x, x_stride, tile, n, first_class, next); break
    for (ptrdiff_t left = n_classes, n; left > 0; left -= n) {
        n = V(classes_of_sweep)(left);
        if (next.at)
            V(fetch_before_sweep)(&next, n, left);
        switch (n) {
            PLACES_AMONG(1);
            PLACES_AMONG(2);
            PLACES_AMONG(3);
            PLACES_AMONG(4);
            PLACES_AMONG(5);
            PLACES_AMONG(6);
            PLACES_AMONG(7);
            PLACES_AMONG(8);
        }
        x += n * x_stride;
        tile = tile ? tile + n * V(tile_stride)(rows) : NULL;
        first_class += n;
        next.at = next.at ? next.at + n * next.class_step : NULL;
    }
#undef PLACES_AMONG
}

typedef struct {
    V(vector) bound, above;
    V(ivector) label, n_below; /* the label's: so many classes on; how many are below the bound */
} V(ranking_lanes);

/* Rank n <= 4 classes. Those that come before the label's are at least its logit as long as their number is
 * lower, then above it. */
INLINE void V(rank_some)(V(ranking_lanes) *rank, const V(real) *x, ptrdiff_t x_stride, int n)
{
    for (int j = 0; j < n; j++) {
        V(mask) is_label = V(equal_bits)(rank->label, V(all_bits)((V(bits))j));
        rank->bound = V(choose)(is_label, rank->above, rank->bound);
        V(mask) is_below = V(greater)(rank->bound, V(load)(x + j * x_stride));
        rank->n_below = V(add_one)(is_below, rank->n_below);
    }
    rank->label -= n;
}

/* How many classes come before a label that is `label` classes on, and whose logit is `target` */
INLINE V(ivector)
    V(n_before)(const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes, V(ivector) label, V(vector) target)
{
    V(ranking_lanes) rank = {target, V(next_above)(target), label, V(all_bits)(0)};
    rank.bound = V(choose)(V(below_bits)(label, V(all_bits)(0)), rank.above, target);
    ptrdiff_t left = n_classes;
    for (; left >= 4; left -= 4, x += 4 * x_stride)
        V(rank_some)(&rank, x, x_stride, 4);
    for (; left > 0; left--, x += x_stride)
        V(rank_some)(&rank, x, x_stride, 1);
    return V(all_bits)((V(bits))n_classes) - rank.n_below;
}

typedef struct {
    V(vector) reference, peak;
    V(long_sum) sum, square, spread;
} V(figuring);

/* Add n classes. Of an exponential and the largest so far, the smaller joins the others. */
INLINE void V(figure_some)(V(figuring) *row, const V(real) *x, ptrdiff_t x_stride, int n)
{
    const V(exp_scale) scale = V(exp_scale_of)(V(all)(-V(LANES_HEADROOM)));
    for (int j = 0; j < n; j++) {
        /* where e is 0 it is finite */
        V(vector) below = V(max)(scale.floor, V(load)(x + j * x_stride) - row->reference), e = below, power;
        V(exp_parts)(&e, &power, 1, scale);
        e *= power;
        V(vector) other = V(min)(row->peak, e);
        row->peak = V(max)(e, row->peak);
        row->sum.chain += other;
        row->square.chain = V(fma)(other, other, row->square.chain);
        row->spread.chain = V(fma)(e, -below, row->spread.chain);
    }
}

/* NaN where a row holds it; else what there was */
static V(vector) V(nan_of)(const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes, V(vector) nan)
{
    for (ptrdiff_t c = 0; c < n_classes; c++) {
        V(vector) logit = V(load)(x + c * x_stride);
        nan = V(choose)(V(equal)(logit, logit), nan, logit);
    }
    return nan;
}

/* Add classes from first_class on to sums, figures and peak; `labels` of the next rows are fetched meanwhile.
 */
static void V(sum_figures_of)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                              ptrdiff_t first_class, const char *labels, V(fetch) next)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        const V(vector) zero = V(all)(0);
        V(fetch_labels)(rows, labels, lane);
        if (next.at) /* known where the next block's lines are */
            V(fetch_classes)(&next, lane, (int)n_classes);
        V(vector) largest = V(load)(rows->largest + lane);
        V(mask) is_finite = V(greater)(V(all)(INFINITY), V(abs)(largest));
        V(ivector) label = V(load_bits)(rows->label + lane) - (V(bits))first_class;
        V(ivector) n_before = V(n_before)(x, x_stride, n_classes, label, V(load)(rows->target_logit + lane));
        V(figuring) row = {.reference = V(keep)(is_finite, largest),
                           .peak = zero,
                           .sum = {zero, zero, zero},
                           .square = {zero, zero, zero},
                           .spread = {zero, zero, zero}};
        if (first_class > 0) {
            n_before += V(load_bits)(rows->n_before + lane);
            row.peak = V(load)(rows->peak + lane);
            row.sum = (V(long_sum)){zero, V(load)(rows->sum + lane), V(load)(rows->sum_lost + lane)};
            row.square = (V(long_sum)){zero, V(load)(rows->weight + lane), V(load)(rows->weight_lost + lane)};
            row.spread = (V(long_sum)){zero, V(load)(rows->gap + lane), V(load)(rows->gap_lost + lane)};
        }
        const V(real) *at = x;
        for (ptrdiff_t left = n_classes, n; left > 0; left -= n) {
            n = left < 8 ? left : 8;
            ptrdiff_t c = 0;
            for (; c + 4 <= n; c += 4, at += 4 * x_stride)
                V(figure_some)(&row, at, x_stride, 4);
            for (; c < n; c++, at += x_stride)
                V(figure_some)(&row, at, x_stride, 1);
            V(fold)(&row.sum), V(fold)(&row.square), V(fold)(&row.spread);
        }
        if (V(any)(V(equal)(V(abs)(largest), V(all)(INFINITY)))) { /* there is no largest to be relative to */
            V(vector) before = first_class > 0 ? V(load)(rows->sum + lane) : zero;
            row.sum.sum = V(choose)(is_finite, row.sum.sum, V(nan_of)(x, x_stride, n_classes, before));
            row.sum.lost = V(keep)(is_finite, row.sum.lost);
        }
        V(store)(rows->peak + lane,
                 V(choose)(is_finite, row.peak, V(all)((V(real))((int64_t)1 << V(LANES_HEADROOM)))));
        V(store)(rows->sum + lane, row.sum.sum);
        V(store)(rows->sum_lost + lane, row.sum.lost);
        V(store)(rows->weight + lane, row.square.sum);
        V(store)(rows->weight_lost + lane, row.square.lost);
        V(store)(rows->gap + lane, row.spread.sum);
        V(store)(rows->gap_lost + lane, row.spread.lost);
        V(store)((V(real) *)(rows->n_before + lane), (V(vector))n_before);
    }
}

static void V(find_figure_sums)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), x_stride;
    int are_beside = V(are_beside)(rows, &job->logits);
    int are_rows = V(is_real)(&job->logits) && job->logits.class_stride == job->logits.itemsize;
    int are_kept = in_tile == job->n_classes; /* in the tile, from the first sweep on */
    const V(real) *following = (const V(real) *)V(place)(&job->logits, rows->first + rows->n, 0);
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        V(fetch) next = {0};
        if (are_beside)
            next = V(fetch_in_place)(rows, x, x_stride,
                                     c + n < job->n_classes || !are_kept ? x + n * x_stride : following);
        V(find_places)(rows, x, x_stride, are_beside && are_kept ? rows->x_tile : NULL, n, c, next);
    }
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = rows->x_tile;
        V(fetch) next = {0};
        x_stride = V(tile_stride)(rows);
        if (!are_kept)
            x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        if (!are_beside)
            next = V(fetch_in_rows)(are_rows ? following + V(LINE) *c : NULL, job->n_classes);
        else if (!are_kept)
            next = V(fetch_block)(c + n < job->n_classes ? x + n * x_stride : following, 1, x_stride);
        const char *labels = c + n == job->n_classes ? rows->labels_ahead : NULL;
        V(sum_figures_of)(rows, x, x_stride, n, c, labels, next);
    }
}

/* The figures of n <= FIGURES_AT_ONCE rows from `first` on, to columns */
INLINE void V(lanes_figures)(const V(lanes) *rows, ptrdiff_t first, ptrdiff_t n,
                             double (*found)[FIGURES_AT_ONCE])
{
    for (ptrdiff_t i = 0; i < n; i += f64_LANES) {
        ptrdiff_t lane = first + i;
#define TAKE(what) PASTE(V(take), f64)(rows->what + lane)
        f64_vector factor = TAKE(factor), poison = 0 * factor;
        f64_mask live = f64_nonzero(TAKE(live));
        f64_vector peak = TAKE(peak), others = TAKE(sum) + TAKE(sum_lost);
        f64_vector gap = TAKE(gap) + TAKE(gap_lost), weight = TAKE(weight) + TAKE(weight_lost);
        f64_store(found[TOP_PROBABILITY] + i, f64_keep(live, peak / (peak + others) + poison));
        f64_store(found[ENTROPY_OF_ROW] + i, f64_keep(live, TAKE(log1p_others) + gap * factor));
        f64_store(found[OTHERS_SQUARED] + i, f64_keep(live, weight * factor * factor));
        f64_vector rank = poison + 1, top = poison;
        for (int j = 0; j < f64_LANES; j++) {
            rank[j] += (double)rows->n_before[lane + j];
            top[j] += (double)rows->top[lane + j];
        }
#undef TAKE
        f64_store(found[RANK] + i, f64_keep(live, rank));
        f64_store(found[TOP] + i, f64_keep(live, top));
    }
}

static void V(put_figures)(const V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    int streams = job->n_rows * FIGURES * (ptrdiff_t)sizeof(double) >= STREAM_FROM;
    for (ptrdiff_t first = 0, n; first < rows->n; first += n) {
        double ALIGNED found[FIGURES][FIGURES_AT_ONCE], ALIGNED tile[FIGURES_AT_ONCE * FIGURES];
        double *to = job->figures + (rows->first + first) * FIGURES;
        n = rows->n - first < FIGURES_AT_ONCE ? rows->n - first : FIGURES_AT_ONCE;
        V(lanes_figures)(rows, first, n, found);
        f64_lanes_to_rows(found[0], FIGURES_AT_ONCE, n, FIGURES, streams ? tile : to, FIGURES);
        if (streams)
            f64_stream_run(to, n * FIGURES, tile);
    }
}
#undef FIGURES_AT_ONCE
#undef V
