/* A block of elements of the losses that have no classes, in one real type; included once for each.
 *
 * BCE with logits: with e = exp(-|x|), softplus(x) = max(x, 0) + log1p(e), and sigmoid(|x|) = 1/(1 + e).
 * Written so, every term is a product of numbers that are not negative, nothing cancels, and the limits at
 * +-inf come out by themselves once 0*inf is taken as 0.
 */
#define V(name) PASTE(REAL, name)

/* Operands as tiles of whole vectors, or NULL; what lies behind the block's elements is 0. */
typedef struct {
    const V(real) *x, *target, *weight, *pos_weight, *scale;
    V(real) *loss, *out;
    V(real) keep, spread; /* 1 - label_smoothing, and half of it to either class */
    int is_signed;
} V(operands);

/* a*b for b >= 0, with 0*inf = 0 (and 0*NaN = NaN) */
INLINE V(vector) V(times)(V(vector) a, V(vector) b)
{
    const V(real) most = sizeof(V(real)) == 8 ? (V(real))0x1p1023 : (V(real))0x1p127;
    return V(choose)(V(nonzero)(a), a * b, a * -V(max)(V(all)(-most), -b));
}

INLINE void V(bce_with_logits)(const V(operands) *at, ptrdiff_t n, int weighted)
{
    for (ptrdiff_t i = 0; i < n; i += V(LANES)) {
        V(vector) x = V(load)(at->x + i), one = V(all)(1);
        V(vector) y = V(load)(at->target + i);
        if (at->is_signed)
            y = (V(real))0.5 * y + (V(real))0.5;
        /* The weights of softplus(x) and of softplus(-x); the first is no difference of rounded numbers. */
        V(vector) negative = at->keep * (one - y) + at->spread, positive = at->keep * y + at->spread;
        V(vector) e = V(exp_nonpositive)(-V(abs)(x));
        V(mask) above = V(greater)(x, V(all)(0));
        if (weighted && at->pos_weight)
            positive *= V(load)(at->pos_weight + i);
        V(vector) loss = V(times)(V(choose)(above, negative, positive), V(abs)(x));
        loss += (negative + positive) * V(log1p_unit)(e);
        V(vector) weight = weighted && at->weight ? V(load)(at->weight + i) : one;
        V(store)(at->loss + i, weighted ? V(times)(weight, loss) : loss);
        if (at->out) {
            V(vector) inverse = one / (one + e), small = e * inverse;
            V(vector) grad =
                negative * V(choose)(above, inverse, small) - positive * V(choose)(above, small, inverse);
            if (at->scale)
                weight *= V(load)(at->scale + i);
            V(store)(at->out + i, grad * weight);
        }
    }
}

INLINE void V(sigmoid)(const V(operands) *at, ptrdiff_t n, int log)
{
    for (ptrdiff_t i = 0; i < n; i += V(LANES)) {
        V(vector) x = V(load)(at->x + i), one = V(all)(1), zero = V(all)(0);
        V(vector) e = V(exp_nonpositive)(-V(abs)(x));
        V(mask) above = V(greater)(x, zero);
        if (log)
            V(store)(at->out + i, V(choose)(above, zero, x) - V(log1p_unit)(e));
        else
            V(store)(at->out + i, V(choose)(above, one, e) / (one + e));
    }
}

/* Losses of probabilities, by the C library's logarithm: no hot path. */
static void V(probability_loss)(pointwise_kind kind, const V(operands) *at, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        double x = at->x[i], y = at->target[i];
        if (kind == BCE) {
            double log_p = fmax(log(x), -100), log_q = fmax(log1p(-x), -100);
            at->loss[i] = (V(real))(-(at->weight ? at->weight[i] : 1) * (y * log_p + (1 - y) * log_q));
        } else {
            double t = kind == KL_DIV ? y : exp(y), log_t = kind == KL_DIV ? log(y) : y;
            at->loss[i] = (V(real))(t == 0 && !isnan(x) ? 0 : t * (log_t - x));
        }
    }
}

static ptrdiff_t V(first_bad)(const pointwise_job *job, const V(operands) *at, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n && job->is_signed; i++)
        if (at->target[i] != 1 && at->target[i] != -1)
            return i;
    for (ptrdiff_t i = 0; i < n && job->kind == BCE; i++)
        if (!(at->x[i] >= 0 && at->x[i] <= 1 && at->target[i] >= 0 && at->target[i] <= 1))
            return i;
    return -1;
}

static double V(total)(const V(real) *loss, ptrdiff_t n)
{
    V(vector) sum[4] = {V(all)(0), V(all)(0), V(all)(0), V(all)(0)};
    ptrdiff_t i = 0;
    for (; i + 4 * V(LANES) <= n; i += 4 * V(LANES))
        for (int j = 0; j < 4; j++)
            sum[j] += V(load)(loss + i + j * V(LANES));
    double total = V(lanes_sum)((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++)
        total += loss[i];
    return total;
}

/* An operand's elements, in place if they fill whole vectors there */
static const V(real) *V(operand)(const array_view *view, ptrdiff_t first, ptrdiff_t n, V(real) *tile)
{
    if (!view->data)
        return NULL;
    const V(real) *items = V(items)(view, first, n, tile);
    if (n % V(LANES) == 0)
        return items;
    if (items != tile)
        memcpy(tile, items, sizeof(V(real)) * (size_t)n);
    for (ptrdiff_t i = n; i % V(LANES) != 0; i++)
        tile[i] = 0;
    return tile;
}

/* Where results are to be computed: in place, if whole vectors fit there, or in `tile` */
static V(real) *V(result)(const array_view *view, ptrdiff_t first, ptrdiff_t n, V(real) *tile)
{
    int in_place = V(is_real)(view) && V(last_stride)(view) == (ptrdiff_t)sizeof(V(real)) &&
                   n % V(LANES) == 0 && V(run_length)(view, first, n) == n;
    return in_place ? (V(real) *)(view->data + view_offset(view, first)) : tile;
}

static void V(pointwise_block)(const pointwise_job *job, ptrdiff_t number, block_result *result)
{
    V(real) ALIGNED tile[7][BLOCK_ELEMENTS];
    ptrdiff_t first = number * BLOCK_ELEMENTS;
    ptrdiff_t n = job->n_elements - first < BLOCK_ELEMENTS ? job->n_elements - first : BLOCK_ELEMENTS;
    V(operands) at = {.x = V(operand)(&job->x, first, n, tile[0]),
                      .target = V(operand)(&job->target, first, n, tile[1]),
                      .weight = V(operand)(&job->weight, first, n, tile[2]),
                      .pos_weight = V(operand)(&job->pos_weight, first, n, tile[3]),
                      .scale = V(operand)(&job->scale, first, n, tile[4]),
                      .loss = job->loss.data ? V(result)(&job->loss, first, n, tile[5]) : tile[5],
                      .out = job->out.data ? V(result)(&job->out, first, n, tile[6]) : NULL,
                      .keep = (V(real))(1 - job->label_smoothing),
                      .spread = (V(real))(job->label_smoothing / 2),
                      .is_signed = job->is_signed};
    ptrdiff_t bad = V(first_bad)(job, &at, n);
    if (bad >= 0) {
        result->first_bad = first + bad;
        return;
    }
    switch (job->kind) {
    case BCE_WITH_LOGITS:
        if (at.weight || at.pos_weight)
            V(bce_with_logits)(&at, n, 1);
        else
            V(bce_with_logits)(&at, n, 0);
        break;
    case SIGMOID: V(sigmoid)(&at, n, 0); break;
    case LOG_SIGMOID: V(sigmoid)(&at, n, 1); break;
    default: V(probability_loss)(job->kind, &at, n);
    }
    if (job->kind != SIGMOID && job->kind != LOG_SIGMOID)
        result->total = V(total)(at.loss, n);
    if (job->loss.data && at.loss == tile[5])
        V(store_items)(&job->loss, first, n, at.loss);
    if (job->out.data && at.out == tile[6])
        V(store_items)(&job->out, first, n, at.out);
}
#undef V
