/* Rows side by side of which figures are wanted: their sums, and what they are told beside their losses;
 * included once for each real type.
 *
 * One sweep finds the largest logits and the labels', a second one sums exponentials relative to the largest:
 * `gap` is the sum of e*(largest - x), `weight` that of e^2, both of all but the top.
 */
#define V(name) PASTE(REAL, name)

/* The next larger number */
INLINE V(vector) V(next_above)(V(vector) x)
{
    V(ivector) bits = (V(ivector))(x + V(all)(0)); /* of -0 that of 0 */
    return (V(vector))(bits + (bits >> (8 * (int)sizeof(V(real)) - 1) | 1));
}

/* The largest logit and its class, first of equals, and the label's */
static void V(find_places)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                           ptrdiff_t first_class)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(ivector) top = first_class ? V(load_bits)(rows->top + lane) : V(all_bits)(0);
        V(vector) largest = first_class ? V(load)(rows->largest + lane) : V(all)(-INFINITY);
        V(vector) target = first_class ? V(load)(rows->target_logit + lane) : V(all)(0);
        V(ivector) label = V(load_bits)(rows->label + lane);
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride);
            V(ivector) number = V(all_bits)((V(bits))(first_class + c));
            V(mask) larger = V(greater)(logit, largest);
            largest = V(choose)(larger, logit, largest);
            top = V(choose_bits)(larger, number, top);
            target = V(choose)(V(equal_bits)(label, number), logit, target);
        }
        V(store)(rows->largest + lane, largest);
        V(store)(rows->target_logit + lane, target);
        V(store)((V(real) *)(rows->top + lane), (V(vector))top);
    }
}

typedef struct {
    V(vector) reference, above, bound;
    V(ivector) top, label, n_before;
    V(long_sum) sum, square, spread;
} V(figuring);

/* Add n <= 4 classes from number c on. Those that come before the label's are at least its logit as long as
 * their number is lower, then above it. */
INLINE void V(figure_some)(V(figuring) *row, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t c, int n)
{
    const V(exp_scale) scale = V(exp_scale_of)(V(all)(-V(LANES_HEADROOM)));
    const V(vector) lowest = V(all)(sizeof(V(real)) == 8 ? (V(real))-2000 : (V(real))-200);
    V(vector) e[4], below[4];
    V(ivector) is_lost; /* not here: they are at most 0 */
    for (int j = 0; j < n; j++) {
        V(ivector) number = V(all_bits)((V(bits))(c + j));
        V(vector) logit = V(load)(x + (c + j) * x_stride);
        row->bound = V(choose)(V(equal_bits)(row->label, number), row->above, row->bound);
        row->n_before = V(choose_bits)(V(not_below)(logit, row->bound), row->n_before + 1, row->n_before);
        below[j] = V(max)(lowest, logit - row->reference); /* where e is 0: finite */
        e[j] = below[j];
    }
    V(exps_fine)(e, n, &scale, 0, &is_lost);
    for (int j = 0; j < n; j++) {
        e[j] = V(drop)(V(equal_bits)(row->top, V(all_bits)((V(bits))(c + j))), e[j]);
        row->sum.chain += e[j];
        row->square.chain = V(fma)(e[j], e[j], row->square.chain);
        row->spread.chain = V(fma)(e[j], -below[j], row->spread.chain);
    }
}

/* NaN where a row holds it; else 0 */
static V(vector) V(nan_of)(const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes)
{
    V(vector) nan = V(all)(0);
    for (ptrdiff_t c = 0; c < n_classes; c++) {
        V(vector) logit = V(load)(x + c * x_stride);
        nan = V(choose)(V(equal)(logit, logit), nan, logit);
    }
    return nan;
}

/* Add classes from first_class on to sums, figures and peak. */
static void V(sum_figures_of)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                              ptrdiff_t first_class, V(fetch) next)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        const V(vector) zero = V(all)(0);
        if (next.at) /* known where the next block's lines are */
            V(fetch_classes)(&next, lane, (int)n_classes);
        V(vector) largest = V(load)(rows->largest + lane), target = V(load)(rows->target_logit + lane);
        V(mask) is_finite = V(greater)(V(all)(INFINITY), V(abs)(largest));
        V(figuring) row = {.reference = V(keep)(is_finite, largest),
                           .above = V(next_above)(target),
                           .top = V(load_bits)(rows->top + lane) - (V(bits))first_class,
                           .label = V(load_bits)(rows->label + lane) - (V(bits))first_class,
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
            case 1: V(figure_some)(&row, x, x_stride, c, 1); break;
            case 2: V(figure_some)(&row, x, x_stride, c, 2); break;
            case 3: V(figure_some)(&row, x, x_stride, c, 3); break;
            default: V(figure_some)(&row, x, x_stride, c, 4);
            }
            if (c % 8 == 4 || c + 4 >= n_classes)
                V(fold)(&row.sum), V(fold)(&row.square), V(fold)(&row.spread);
        }
        if (V(any)(
                V(not_below)(V(abs)(largest), V(all)(INFINITY)))) /* there is no largest to be relative to */
            row.sum.sum = V(choose)(is_finite, row.sum.sum, V(nan_of)(x, x_stride, n_classes));
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
    for (int sweep = 0; sweep < 2; sweep++)
        for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
            n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
            const V(real) *x = rows->x_tile;
            if (sweep == 0 || n < job->n_classes || are_beside)
                x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
            if (sweep == 0) {
                V(find_places)(rows, x, x_stride, n, c);
                continue;
            }
            const V(real) *following = (const V(real) *)V(place)(&job->logits, rows->first + rows->n, 0);
            V(fetch) next =
                V(fetch_block)(c + n < job->n_classes ? x + n * x_stride : following, 1, x_stride);
            if (!are_beside)
                next = V(fetch_in_rows)(are_rows ? following + V(LINE) *c : NULL, job->n_classes);
            V(sum_figures_of)(rows, x, x_stride, n, c, next);
        }
}

static void V(put_figures)(const V(lanes) *rows)
{
    double *figures = rows->job->figures + rows->first * FIGURES;
    double ALIGNED found[FIGURES][f64_LANES];
    for (ptrdiff_t lane = 0; lane < rows->n; lane += f64_LANES) {
#define TAKE(what) PASTE(V(take), f64)(rows->what + lane)
        f64_vector factor = TAKE(factor), poison = 0 * factor;
        f64_mask live = f64_nonzero(TAKE(live));
        f64_vector gap = TAKE(gap) + TAKE(gap_lost), weight = TAKE(weight) + TAKE(weight_lost);
        f64_store(found[TOP_PROBABILITY], f64_keep(live, TAKE(peak) * factor));
        f64_store(found[ENTROPY_OF_ROW], f64_keep(live, TAKE(log1p_others) + gap * factor));
        f64_store(found[OTHERS_SQUARED], f64_keep(live, weight * factor * factor));
        f64_vector rank = poison + 1, top = poison;
        for (int i = 0; i < f64_LANES; i++) {
            rank[i] += (double)rows->n_before[lane + i];
            top[i] += (double)rows->top[lane + i];
        }
#undef TAKE
        f64_store(found[RANK], f64_keep(live, rank));
        f64_store(found[TOP], f64_keep(live, top));
        for (ptrdiff_t i = 0; i < f64_LANES && lane + i < rows->n; i++, figures += FIGURES)
            for (int k = 0; k < FIGURES; k++)
                figures[k] = found[k][i];
    }
}
#undef V
