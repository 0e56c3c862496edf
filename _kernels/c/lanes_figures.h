/* What rows side by side are told beside their losses, once those are known: a further sweep over their
 * classes; included once for each real type.
 */
#define V(name) PASTE(REAL, name)

/* The next larger number */
INLINE V(vector) V(next_above)(V(vector) x)
{
    V(ivector) bits = (V(ivector))(x + V(all)(0)); /* of -0 that of 0 */
    return (V(vector))(bits + (bits >> (8 * (int)sizeof(V(real)) - 1) | 1));
}

/* Add classes from first_class on: to `gap` p*(largest - x), to `weight` the others' p^2, to n_before those
 * that come before the label's. These are at least its logit as long as their number is lower, then above it.
 */
static void V(add_figures)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                           ptrdiff_t first_class)
{
    const V(vector) zero = V(all)(0), most = V(all)(sizeof(V(real)) == 8 ? (V(real))1e300 : (V(real))1e38);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(vector) largest = V(load)(rows->largest + lane), factor = V(load)(rows->factor + lane);
        V(vector) shift = V(load)(rows->shift + lane), target = V(load)(rows->target_logit + lane);
        V(exp_scale) scale = V(exp_scale_of)(V(load)(rows->exponent + lane));
        V(ivector) top = V(load_bits)(rows->top + lane) - (V(bits))first_class;
        V(ivector) label = V(load_bits)(rows->label + lane) - (V(bits))first_class;
        V(ivector) n_before = V(load_bits)(rows->n_before + lane);
        V(vector) above = V(next_above)(target);
        V(vector) bound = V(choose)(V(below_bits)(label, V(all_bits)(0)), above, target);
        V(long_sum) square = {zero, V(load)(rows->weight + lane), V(load)(rows->weight_lost + lane)};
        V(long_sum) spread = {zero, V(load)(rows->gap + lane), V(load)(rows->gap_lost + lane)};
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(ivector) number = V(all_bits)((V(bits))c);
            V(vector) logit = V(load)(x + c * x_stride), p = V(exp_fine)(logit - shift, scale) * factor;
            bound = V(choose)(V(equal_bits)(label, number), above, bound);
            n_before = V(choose_bits)(V(not_below)(logit, bound), n_before + 1, n_before);
            spread.chain = V(fma)(p, V(min)(largest - logit, most), spread.chain); /* not 0*inf */
            p = V(drop)(V(equal_bits)(top, number), p);
            square.chain = V(fma)(p, p, square.chain);
            if (c % 8 == 7) {
                V(fold)(&spread);
                V(fold)(&square);
            }
        }
        V(fold)(&spread);
        V(fold)(&square);
        V(store)(rows->weight + lane, square.sum);
        V(store)(rows->weight_lost + lane, square.lost);
        V(store)(rows->gap + lane, spread.sum);
        V(store)(rows->gap_lost + lane, spread.lost);
        V(store)((V(real) *)(rows->n_before + lane), (V(vector))n_before);
    }
}

static void V(find_lane_figures)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), x_stride;
    size_t size = sizeof(V(real)) * (size_t)rows->width;
    memset(rows->weight, 0, size);
    memset(rows->weight_lost, 0, size);
    memset(rows->gap, 0, size);
    memset(rows->gap_lost, 0, size);
    memset(rows->n_before, 0, size);
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = rows->x_tile;
        if (c > 0 || n < job->n_classes || V(are_beside)(rows, &job->logits))
            x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        else
            x_stride = V(tile_stride)(rows); /* they are still there */
        V(add_figures)(rows, x, x_stride, n, c);
    }
    for (ptrdiff_t i = 0; i < rows->n; i++) {
        double *figures = job->figures + (rows->first + i) * FIGURES;
        int is_poisoned = isnan(rows->log1p_others[i]);
        for (int k = 0; k < FIGURES; k++)
            figures[k] = rows->live[i] != 0 ? NAN : 0;
        if (rows->live[i] == 0 || is_poisoned)
            continue;
        figures[RANK] = 1 + (double)rows->n_before[i];
        figures[TOP] = (double)rows->top[i];
        figures[TOP_PROBABILITY] = rows->peak[i] * rows->factor[i];
        figures[ENTROPY_OF_ROW] = rows->log1p_others[i] + ((double)rows->gap[i] + rows->gap_lost[i]);
        figures[OTHERS_SQUARED] = (double)rows->weight[i] + rows->weight_lost[i];
    }
}
#undef V
