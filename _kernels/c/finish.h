/* From the statistics of rows to loss, lse and the coefficients of the gradient, for as many rows as a vector
 * has lanes; included once for each real type. The rows may come from anywhere and be summed in another type:
 * `others` and p_top say all that follows from the exponentials.
 */
#define V(name) PASTE(REAL, name)

typedef struct {
    /* Given. A row is poisoned where `others` is NaN. */
    V(vector) largest;                         /* the largest logit, the top */
    V(vector) others;                          /* the sum of exp(x - largest) of all but the top */
    V(vector) lse_if_poisoned;                 /* what lse is then */
    V(vector) weight, gap;                     /* the others' sum of gamma, and sum of gamma*(largest - x) */
    V(vector) top_weight;                      /* the top's gamma */
    V(vector) beta, label_gamma, target_logit; /* the label's; any numbers where there is none */
    V(vector) scale;                           /* the gradient's */
    V(vector) lse_in;                          /* read if that is among the terms */
    V(mask) live;                              /* not ignored */
    /* Found */
    V(vector) log1p_others, lse, loss;
    V(vector) p_top;       /* p = exp(x - largest)*p_top */
    V(vector) alpha;       /* a class's entry is alpha*p - scale*gamma; but for */
    V(vector) top_entry;   /* the top's (if there is gamma), where 1 - p may be far below p's rounding, */
    V(vector) label_entry; /* and the label's, the top or not */
} V(finishing);

/* Which terms a loss has; where they are constants, the compiler leaves out the rest. */
typedef struct {
    int labels, gamma, z_loss, lse_in, gradient;
} V(terms);

INLINE V(terms) V(terms_of)(const softmax_job *job)
{
    V(terms) terms = {job->target_kind == LABELS, job->target_kind == PROBABILITIES || job->gamma,
                      job->z_loss != 0, job->lse_in.data != NULL, job->second_pass == GRADIENT};
    return terms;
}

/* With log1p_others, p_top and the others' share of 1 */
INLINE V(vector) V(finish_softmax)(V(terms) terms, V(finishing) *row)
{
    if (!terms.lse_in) {
        row->log1p_others = V(log1p_nonnegative)(row->others);
        row->lse = row->largest + row->log1p_others;
        row->lse = V(choose)(V(equal)(row->others, row->others), row->lse, row->lse_if_poisoned);
        row->p_top = 1 / (row->others + 1);
        return row->others * row->p_top;
    }
    /* p is relative to the lse given; 1 - p of a very likely top is the others' share of it. */
    V(mask) finite = V(greater)(V(all)(INFINITY), V(abs)(row->lse_in));
    V(vector) ahead = V(choose)(finite, row->largest - row->lse_in, V(all)(NAN));
    V(real) ALIGNED lane[V(LANES)];
    V(store)(lane, ahead);
    for (int i = 0; i < V(LANES); i++)
        lane[i] = (V(real))-expm1(lane[i]);
    V(vector) rest = V(load)(lane);
    row->lse = row->lse_in;
    row->log1p_others = -ahead;
    row->p_top = V(exp_fine)(ahead, V(exp_scale_of)(V(all)(0)));
    return V(choose)(V(greater)(rest, V(all)((V(real))1e-3)), rest, row->others * row->p_top);
}

INLINE void V(finish)(V(terms) terms, double z_loss, V(finishing) *row)
{
    V(vector) zero = V(all)(0), beta = zero, cost = zero, loss = zero, slope = zero;
    V(vector) p_others = V(finish_softmax)(terms, row), gamma_sum = zero;
    if (terms.labels) {
        beta = V(keep)(row->live, row->beta);
        cost = (row->largest - row->target_logit) + row->log1p_others;
        loss = V(choose)(V(nonzero)(beta), beta * cost, zero * row->log1p_others);
    }
    if (terms.gamma) {
        gamma_sum = row->weight + row->top_weight;
        loss += gamma_sum * row->log1p_others + row->gap;
    }
    if (terms.z_loss) {
        slope = row->lse * (V(real))(2 * z_loss);
        loss += row->lse * row->lse * (V(real))z_loss + zero * row->log1p_others;
    }
    row->loss = V(keep)(row->live, loss);
    row->alpha = V(all)(1);
    if (!terms.gradient)
        return;
    row->alpha = row->scale * (beta + gamma_sum + slope);
    if (terms.gamma)
        row->top_entry =
            row->scale * (row->p_top * (row->weight + slope + beta) - p_others * row->top_weight);
    if (terms.labels) {
        V(vector) own = beta + (terms.gamma ? row->label_gamma : zero), rest = slope;
        if (terms.gamma)
            rest += row->weight + (row->top_weight - row->label_gamma);
        V(vector) if_top = row->scale * (row->p_top * rest - p_others * own);
        V(vector) p = V(exp_fine)(row->target_logit - row->largest, V(exp_scale_of)(zero)) * row->p_top;
        V(mask) label_is_top = V(equal)(row->target_logit, row->largest);
        row->label_entry = V(choose)(label_is_top, if_top, row->alpha * p - row->scale * own);
    }
}
#undef V
