/* Rows side by side of which figures are wanted: their sums, and what they are told beside their losses;
 * included once for each real type.
 *
 * One sweep finds the largest logits and the labels', a second one sums exponentials relative to the largest:
 * `gap` is the sum of e*(largest - x), `weight` that of e^2, both of all but the top.
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
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
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
                V(store)(tile + c * V(tile_stride)(rows) + lane, logit);
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
    V(vector) reference, above, bound;
    V(ivector) top, label, number, n_before; /* `number`: of the class that comes next */
    V(long_sum) sum, square, spread;
} V(figuring);

/* Add n <= 4 classes. Those that come before the label's are at least its logit as long as their number is
 * lower, then above it. */
INLINE void V(figure_some)(V(figuring) *row, const V(real) *x, ptrdiff_t x_stride, int n)
{
    const V(exp_scale) scale = V(exp_scale_of)(V(all)(-V(LANES_HEADROOM)));
    V(vector) e[4], below[4], power[4];
    V(mask) is_top[4];
    for (int j = 0; j < n; j++, row->number += 1) {
        V(vector) logit = V(load)(x + j * x_stride);
        is_top[j] = V(equal_bits)(row->top, row->number);
        row->bound = V(choose)(V(equal_bits)(row->label, row->number), row->above, row->bound);
        row->n_before = V(choose_bits)(V(not_below)(logit, row->bound), row->n_before + 1, row->n_before);
        below[j] = V(max)(scale.floor, logit - row->reference); /* where e is 0: finite */
        e[j] = below[j];
    }
    V(exp_parts)(e, power, n, scale);
    for (int j = 0; j < n; j++) {
        e[j] = V(drop)(is_top[j], e[j] * power[j]);
        row->sum.chain += e[j];
        row->square.chain = V(fma)(e[j], e[j], row->square.chain);
        row->spread.chain = V(fma)(e[j], -below[j], row->spread.chain);
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
        V(vector) largest = V(load)(rows->largest + lane), target = V(load)(rows->target_logit + lane);
        V(mask) is_finite = V(greater)(V(all)(INFINITY), V(abs)(largest));
        V(figuring) row = {.reference = V(keep)(is_finite, largest),
                           .above = V(next_above)(target),
                           .top = V(load_bits)(rows->top + lane) - (V(bits))first_class,
                           .label = V(load_bits)(rows->label + lane) - (V(bits))first_class,
                           .number = V(all_bits)(0),
                           .n_before = V(all_bits)(0),
                           .sum = {zero, zero, zero},
                           .square = {zero, zero, zero},
                           .spread = {zero, zero, zero}};
        row.bound = V(choose)(V(below_bits)(row.label, V(all_bits)(0)), row.above, target);
        if (first_class > 0) {
            row.n_before = V(load_bits)(rows->n_before + lane);
            row.sum = (V(long_sum)){zero, V(load)(rows->sum + lane), V(load)(rows->sum_lost + lane)};
            row.square = (V(long_sum)){zero, V(load)(rows->weight + lane), V(load)(rows->weight_lost + lane)};
            row.spread = (V(long_sum)){zero, V(load)(rows->gap + lane), V(load)(rows->gap_lost + lane)};
        }
        for (ptrdiff_t c = 0; c < n_classes; c += 4) {
            switch (n_classes - c) {
            case 1: V(figure_some)(&row, x + c * x_stride, x_stride, 1); break;
            case 2: V(figure_some)(&row, x + c * x_stride, x_stride, 2); break;
            case 3: V(figure_some)(&row, x + c * x_stride, x_stride, 3); break;
            default: V(figure_some)(&row, x + c * x_stride, x_stride, 4);
            }
            if (c % 8 == 4 || c + 4 >= n_classes)
                V(fold)(&row.sum), V(fold)(&row.square), V(fold)(&row.spread);
        }
        if (V(any)(V(not_below)(V(abs)(largest),
                                V(all)(INFINITY)))) { /* there is no largest to be relative to */
            V(vector) before = first_class > 0 ? V(load)(rows->sum + lane) : zero;
            row.sum.sum = V(choose)(is_finite, row.sum.sum, V(nan_of)(x, x_stride, n_classes, before));
            row.sum.lost = V(keep)(is_finite, row.sum.lost);
        }
        V(store)(rows->peak + lane, V(all)((V(real))((int64_t)1 << V(LANES_HEADROOM))));
        V(store)(rows->sum + lane, row.sum.sum);
        V(store)(rows->sum_lost + lane, row.sum.lost);
        V(store)(rows->weight + lane, row.square.sum);
        V(store)(rows->weight_lost + lane, row.square.lost);
        V(store)(rows->gap + lane, row.spread.sum);
        V(store)(rows->gap_lost + lane, row.spread.lost);
        V(store)((V(real) *)(rows->n_before + lane), (V(vector))row.n_before);
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
        double ALIGNED found[FIGURES][FIGURES_AT_ONCE], ALIGNED tile[FIGURES_AT_ONCE][FIGURES];
        double *to = job->figures + (rows->first + first) * FIGURES;
        n = rows->n - first < FIGURES_AT_ONCE ? rows->n - first : FIGURES_AT_ONCE;
        V(lanes_figures)(rows, first, n, found);
        double (*row)[FIGURES] = streams ? tile : (double (*)[FIGURES])(void *)to;
        for (ptrdiff_t i = 0; i < n; i++)
            for (int k = 0; k < FIGURES; k++)
                row[i][k] = found[k][i];
        if (streams)
            f64_stream_run(to, n * FIGURES, tile[0]);
    }
}
#undef FIGURES_AT_ONCE
#undef V
