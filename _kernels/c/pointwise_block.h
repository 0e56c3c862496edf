/* A block of elements of the losses that have no classes, in one real type; included once for each: finds its
 * operands, or makes them in a tile, and hands them to the loss.
 */
#define V(name) PASTE(REAL, name)

INLINE void V(sigmoid)(const V(operands) *at, ptrdiff_t n, int log)
{
    const distances behind = at->behind;
    for (ptrdiff_t i = 0; i < n; i += V(QUAD)) {
        V(vector) e[4], one = V(all)(1), zero = V(all)(0);
        fetch_ahead(at->x + i, 4 * VECTOR_BYTES, behind);
        for (int j = 0; j < 4; j++)
            e[j] = -V(abs)(V(load)(at->x + i + j * V(LANES)));
        V(exp_nonpositive)(e, 1);
        EACH
        {
            V(vector) x = V(load)(at->x + i + j * V(LANES));
            V(mask) above = V(greater)(x, zero);
            V(store)(at->out + i + j * V(LANES), log ? V(choose)(above, zero, x) - V(log1p_unit)(e[j])
                                                     : V(choose)(above, one, e[j]) / (one + e[j]));
        }
        if (at->stream)
            V(drain)(at->stream, at->out, i);
    }
}

/* Losses of probabilities, by the C library's logarithm: no hot path; returns their sum. */
static double V(probability_loss)(pointwise_kind kind, const V(operands) *at, ptrdiff_t n)
{
    compensated total = {0, 0};
    double loss;
    for (ptrdiff_t i = 0; i < n; i++) {
        double x = at->x[i], y = at->target[i];
        if (kind == BCE) {
            double log_p = fmax(log(x), -100), log_q = fmax(log1p(-x), -100);
            loss = -(double)at->weight.at[i & at->weight.step] * (y * log_p + (1 - y) * log_q);
        } else {
            double t = kind == KL_DIV ? y : exp(y), log_t = kind == KL_DIV ? log(y) : y;
            loss = t == 0 && !isnan(x) ? 0 : t * (log_t - x);
        }
        at->loss[i] = (V(real))loss;
        add(&total, loss);
    }
    return value_of(&total);
}

static double V(total)(const V(real) *loss, ptrdiff_t n)
{
    double total[4] = {0, 0, 0, 0};
    for (ptrdiff_t i = 0; i < n; i++)
        total[i % 4] += loss[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

/* Labels -1 and +1 as 0 and 1, in `tile`; returns the first that is neither, or -1. */
static ptrdiff_t V(unsign)(const V(real) **target, ptrdiff_t n, V(real) *tile)
{
    ptrdiff_t bad = -1;
    for (ptrdiff_t i = 0; i < n; i += V(LANES)) {
        V(vector) t = V(load)(*target + i), one = V(all)(1);
        if (bad < 0 && V(any)(V(nonzero)(V(abs)(t) - one)))
            for (bad = i; fabs((double)(*target)[bad]) == 1;)
                bad++;
        V(store)(tile + i, (V(real))0.5 * (t + one));
    }
    *target = tile;
    return bad;
}

static ptrdiff_t V(first_improbable)(const V(operands) *at, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        V(real) x = at->x[i], y = at->target[i];
        if (!(x >= 0 && x <= 1 && y >= 0 && y <= 1))
            return i;
    }
    return -1;
}

static int V(is_number)(const array_view *view)
{
    return !view->data || (view->ndim == 1 && view->stride[0] == 0);
}

/* Elements first ... first + n - 1, followed by `behind` up to `whole` */
static const V(real) *V(operand)(const array_view *view, ptrdiff_t first, ptrdiff_t n, ptrdiff_t whole,
                                 V(real) behind, V(real) *tile)
{
    const V(real) *items = V(items)(view, first, n, tile);
    if (n == whole)
        return items;
    if (items != tile)
        memcpy(tile, items, sizeof(V(real)) * (size_t)n);
    for (ptrdiff_t i = n; i < whole; i++)
        tile[i] = behind;
    return tile;
}

/* The same of coefficients, which are 1 where not given, followed by 0 */
static V(source)
    V(coefficient)(const array_view *view, ptrdiff_t first, ptrdiff_t n, ptrdiff_t whole, V(real) *tile)
{
    if (!V(is_number)(view))
        return (V(source)){V(operand)(view, first, n, whole, 0, tile), -1};
    V(real) number = view->data ? (V(real))view_real(view, view->data) : 1;
    V(store)(tile, V(all)(number));
    for (ptrdiff_t i = 0; n < whole && i < whole; i++)
        tile[i] = i < n ? number : 0;
    return (V(source)){tile, -(n < whole)};
}

/* Whether a run of results can be computed where it is to be */
static int V(fits)(const array_view *view, ptrdiff_t first, ptrdiff_t n)
{
    return V(is_real)(view) && V(last_stride)(view) == (ptrdiff_t)sizeof(V(real)) &&
           V(run_length)(view, first, n) == n;
}

static double V(bce_with_logits)(const pointwise_job *job, V(operands) *at, ptrdiff_t first, ptrdiff_t n,
                                 ptrdiff_t whole, V(real) *target_tile, V(real) *loss_tile)
{
    typedef double pass(const V(operands) *, ptrdiff_t);
    static pass *const passes[5][2][2] = {{{V(bce_CAREFUL00), V(bce_CAREFUL01)}},
#ifdef REAL_IS_F64
                                          {{V(bce_WEIGHTED00), V(bce_WEIGHTED01)}},
                                          {{V(bce_PLAIN00), V(bce_PLAIN01)}},
                                          {{NULL, V(bce_HARD01)}},
                                          {{V(bce_BY_CLASS00), V(bce_BY_CLASS01)}}
#else
                                          {{V(bce_WEIGHTED00), V(bce_WEIGHTED01)},
                                           {V(bce_WEIGHTED10), V(bce_WEIGHTED11)}},
                                          {{V(bce_PLAIN00), V(bce_PLAIN01)},
                                           {V(bce_PLAIN10), V(bce_PLAIN11)}},
                                          {{NULL, V(bce_HARD01)}, {NULL, V(bce_HARD11)}},
                                          {{V(bce_BY_CLASS00), V(bce_BY_CLASS01)},
                                           {V(bce_BY_CLASS10), V(bce_BY_CLASS11)}}
#endif
    };
    int weighted = job->weight.data || job->pos_weight.data || at->loss || !V(is_number)(&job->scale);
    int kind = job->label_smoothing != 0 ? CAREFUL : weighted ? WEIGHTED : PLAIN;
    double total = NAN, ordinary = 0x1p-90;
    int one_weight = !job->weight.data && !at->loss && V(is_number)(&job->pos_weight) &&
                     (!at->out || V(is_number)(&job->scale));
    int hard = kind == WEIGHTED && one_weight ? BY_CLASS : kind == PLAIN && at->out ? HARD : 0;
    if (hard) {
        double y = at->bytes ? at->bytes[0] : at->target[0]; /* if it is soft, others will be */
        if (y == 0 || y == 1)
            total = passes[hard][at->bytes != NULL][at->out != NULL](at, whole);
        ordinary *= fmax(1, fabs((double)at->pos_weight.at[0]));
    }
    if (isnan(total))
        total = passes[kind][at->bytes != NULL][at->out != NULL](at, whole);
    if (isfinite(total) && fabs(total) >= ordinary)
        return total;
    if (at->bytes)
        at->target = V(operand)(&job->target, first, n, whole, 0, target_tile);
    if (!at->loss)
        at->loss = loss_tile;
    V(bce_CAREFUL00)(at, whole);
    return V(total)(at->loss, n);
}

static void V(pointwise_block)(const pointwise_job *job, ptrdiff_t number, V(real) *scratch,
                               block_result *result)
{
    V(real) *tile[POINTWISE_TILES];
    for (int k = 0; k < POINTWISE_TILES; k++)
        tile[k] = scratch + k * tile_elements(job);
    ptrdiff_t first = number * BLOCK_ELEMENTS;
    ptrdiff_t n = job->n_elements - first < BLOCK_ELEMENTS ? job->n_elements - first : BLOCK_ELEMENTS;
    ptrdiff_t whole = (n + V(QUAD) - 1) / V(QUAD) *V(QUAD);
    const array_view *target = &job->target;
    int loss_fits = job->loss.data && n == whole && V(fits)(&job->loss, first, n);
    V(operands) at = {.x = V(operand)(&job->x, first, n, whole, -(V(real))0x1p100, tile[0]),
                      .weight = V(coefficient)(&job->weight, first, n, whole, tile[2]),
                      .pos_weight = V(coefficient)(&job->pos_weight, first, n, whole, tile[3]),
                      .scale = V(coefficient)(&job->scale, first, n, whole, tile[4]),
                      .loss = loss_fits        ? (V(real) *)(job->loss.data + view_offset(&job->loss, first))
                              : job->loss.data ? tile[5]
                                               : NULL,
                      .out = job->out.data ? tile[6] : NULL,
                      .keep = (V(real))(1 - job->label_smoothing),
                      .spread = (V(real))(job->label_smoothing / 2),
                      .behind = in_order};
    V(real) *stream = job->streams && n == whole && V(fits)(&job->out, first, n)
                          ? (V(real) *)(job->out.data + view_offset(&job->out, first))
                          : NULL;
    at.stream = stream == at.x ? NULL : stream; /* the logits may be needed again */
    if (sizeof(V(real)) == sizeof(float) && (target->dtype == DTYPE_U8 || target->dtype == DTYPE_BOOL) &&
        target->data && !job->is_signed && job->kind == BCE_WITH_LOGITS && n == whole &&
        job->label_smoothing == 0 && V(last_stride)(target) == 1 && V(run_length)(target, first, n) == n) {
        at.bytes = (const uint8_t *)target->data + view_offset(target, first);
        at.largest = target->dtype == DTYPE_BOOL ? 1 : UINT8_MAX;
    } else if (target->data)
        at.target = V(operand)(target, first, n, whole, job->is_signed ? -1 : 0, tile[1]);
    ptrdiff_t bad = job->is_signed     ? V(unsign)(&at.target, whole, tile[1])
                    : job->kind == BCE ? V(first_improbable)(&at, n)
                                       : -1;
    if (bad >= 0) {
        result->first_bad = first + bad;
        return;
    }
    switch (job->kind) {
    case BCE_WITH_LOGITS:
        result->total = V(bce_with_logits)(job, &at, first, n, whole, tile[1], tile[5]);
        break;
    case SIGMOID: V(sigmoid)(&at, whole, 0); break;
    case LOG_SIGMOID: V(sigmoid)(&at, whole, 1); break;
    default: at.loss = loss_fits ? at.loss : tile[5]; result->total = V(probability_loss)(job->kind, &at, n);
    }
    if (job->loss.data && !loss_fits)
        V(store_items)(&job->loss, first, n, tile[5]);
    if (!job->out.data)
        return;
    if (stream) {
        ptrdiff_t head = at.stream ? V(to_line)(stream) : n, done = at.stream ? head + n - V(QUAD) : n;
        V(stream_run)(stream, head, at.out);
        V(stream_run)(stream + done, n - done, at.out + done);
        fence();
    } else
        V(store_items)(&job->out, first, n, tile[6]);
}
#undef EACH
#undef V
