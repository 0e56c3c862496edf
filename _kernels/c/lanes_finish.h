/* Finish the rows of lanes_block.h in type WIDE, a vector of rows at a time: loss, lse and what the second
 * pass needs; returns the sum of losses. Included once for each type that rows finish in.
 */
#define W(name) PASTE(WIDE, name)
#define TAKE(what) PASTE(V(take), WIDE)(rows->what + lane)
#define GIVE(what, vector) PASTE(V(give), WIDE)(rows->what + lane, vector)

INLINE double PASTE(V(finish_terms), WIDE)(V(lanes) *rows, W(terms) terms)
{
    const softmax_job *job = rows->job;
    W(vector) zero = W(all)(0), infinity = W(all)(INFINITY);
    f64_vector total = f64_all(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += W(LANES)) {
        W(vector) sum = TAKE(sum), unit = 1 / TAKE(peak), with_lost = sum + TAKE(sum_lost);
        W(finishing) row = {.largest = TAKE(largest), .beta = TAKE(beta), .scale = TAKE(scale)};
        sum = W(choose)(W(greater)(infinity, W(abs)(sum)), with_lost, sum);
        W(mask) is_finite = W(greater)(infinity, W(abs)(row.largest));
        row.others = W(choose)(is_finite, sum / TAKE(peak), W(all)(NAN));
        row.lse_if_poisoned = row.largest + sum * 0;
        row.live = W(nonzero)(TAKE(live));
        row.target_logit = TAKE(target_logit);
        row.weight = row.gap = row.top_weight = row.label_gamma = zero;
        if (terms.gamma) {
            W(vector) gap = TAKE(gap), whole_gap = gap + TAKE(gap_lost);
            row.gap = W(choose)(W(greater)(infinity, W(abs)(gap)), whole_gap, gap);
            W(vector) weight = TAKE(weight), whole_weight = weight + TAKE(weight_lost);
            row.weight = W(choose)(W(greater)(infinity, W(abs)(weight)), whole_weight, weight);
            row.top_weight = TAKE(top_weight);
            if (terms.labels)
                row.label_gamma = TAKE(label_gamma);
        }
        if (terms.lse_in)
            row.lse_in = W(load)((const W(real) *)rows->lse_in + lane);
        W(finish)(terms, job->z_loss, &row);
        W(real) ALIGNED loss[W(LANES)];
        W(store)(loss, row.loss);
        for (int i = 0; i < W(LANES); i += f64_LANES)
            total += PASTE(W(take), f64)(loss + i);
        GIVE(loss, row.loss);
        if (job->lse.data)
            W(store)((W(real) *)rows->lse + lane, row.lse);
        if (job->second_pass == NOTHING && !job->figures)
            continue;
        W(vector) factor = row.p_top * unit;
        if (!terms.lse_in) { /* the same, with fewer roundings */
            W(vector) whole = TAKE(peak) + sum, inverse = 1 / whole;
            factor = W(fma)(W(fma)(-inverse, whole, W(all)(1)), inverse, inverse);
            factor = W(choose)(W(equal)(row.others, row.others), factor, row.others);
        }
        GIVE(factor, factor * row.alpha);
        GIVE(log1p_others, row.log1p_others);
        if (terms.labels && terms.gradient)
            GIVE(label_entry, row.label_entry);
        if (terms.gamma && terms.gradient)
            GIVE(top_entry, row.top_entry);
    }
    return f64_lanes_sum(total);
}

static double PASTE(V(finish_lanes), WIDE)(V(lanes) *rows)
{
    W(terms) terms = W(terms_of)(rows->job), value = {1, 0, 0, 0, 0}, both = {1, 0, 0, 0, 1};
    if (memcmp(&terms, &value, sizeof terms) == 0)
        return PASTE(V(finish_terms), WIDE)(rows, value);
    if (memcmp(&terms, &both, sizeof terms) == 0)
        return PASTE(V(finish_terms), WIDE)(rows, both);
    return PASTE(V(finish_terms), WIDE)(rows, terms);
}
#undef TAKE
#undef GIVE
#undef W
