/* From the statistics of a block's rows to their losses, and the second pass: gradient, softmax or entropy,
 * while the rows or their exponentials are in the cache; included once for each real type.
 */
#define V(name) PASTE(REAL, name)

/* How many classes come before a label of logit -inf */
static ptrdiff_t V(rank_of_none)(const V(block) *block, ptrdiff_t i)
{
    const array_view *logits = &block->job->logits;
    ptrdiff_t n_before = 0;
    for (ptrdiff_t c = 0; c < block->job->n_classes; c++)
        n_before +=
            view_real(logits, V(item)(logits, block->first + i, c)) > -INFINITY || c < block->label[i];
    return n_before;
}

/* What else is told of a row; an exponential in its sums times `scale` is a probability. */
static void V(find_figures)(const V(block) *block, ptrdiff_t i, double *figures)
{
    const row_statistics *row = block->statistics + i;
    const row_softmax *softmax = &block->softmax;
    double scale = softmax->factor[i] * power_of_2(row->exponent - softmax->exponent[i]);
    for (int k = 0; k < FIGURES; k++)
        figures[k] = block->live[i] ? NAN : 0;
    if (!block->live[i] || isnan(softmax->p_top[i]))
        return;
    int is_ranked = block->target_logit[i] > -INFINITY;
    figures[RANK] = 1 + (double)(is_ranked ? row->n_before : V(rank_of_none)(block, i));
    figures[TOP] = (double)row->top;
    figures[TOP_PROBABILITY] = softmax->p_top[i];
    figures[ENTROPY_OF_ROW] = softmax->log1p_others[i] + value_of(&row->spread) * scale;
    figures[OTHERS_SQUARED] = value_of(&row->square) * scale * scale;
}

/* From statistics to losses: cost of a class = lse - x = (largest - x) + log1p_others. Returns their sum. */
static double V(find_losses)(V(block) *block)
{
    const softmax_job *job = block->job;
    double total = 0;
    for (ptrdiff_t i = 0; i < block->n; i++) {
        const row_statistics *row = block->statistics + i;
        double lse = block->softmax.lse[i], log1p_others = block->softmax.log1p_others[i];
        double loss = 0, beta = 0, gamma_sum = job->gamma_sum;
        if (job->target_kind == LABELS && block->live[i]) {
            double cost = (row->largest - block->target_logit[i]) + log1p_others;
            beta = job->beta ? job->beta[block->label[i]] : 1;
            loss = beta != 0 ? beta * cost : 0 * log1p_others;
        }
        if (job->target_kind == PROBABILITIES)
            gamma_sum = value_of(&row->weight) + row->top_weight;
        if (job->target_kind == PROBABILITIES || job->gamma)
            loss += gamma_sum * log1p_others + value_of(&row->gap);
        if (job->z_loss != 0)
            loss += job->z_loss * lse * lse + 0 * log1p_others;
        loss = block->live[i] ? loss : 0;
        total += loss;
        block->alpha[i] =
            job->second_pass == GRADIENT
                ? block->scale[i] * (beta + gamma_sum + (job->z_loss != 0 ? 2 * job->z_loss * lse : 0))
                : 1;
        if (job->loss.data)
            put_real(&job->loss, V(item)(&job->loss, block->first + i, 0), loss);
        if (job->lse.data)
            put_real(&job->lse, V(item)(&job->lse, block->first + i, 0), lse);
        if (job->figures)
            V(find_figures)(block, i, job->figures + (block->first + i) * FIGURES);
    }
    return total;
}

/* The row's second pass. The label's entry and the largest's are not alpha*p - gamma: the largest's is formed
 * from the others, as 1 - p may be far below p's rounding. */
static finished_row V(finished)(const V(block) *block, ptrdiff_t i)
{
    const softmax_job *job = block->job;
    const row_statistics *row = block->statistics + i;
    const row_softmax *softmax = &block->softmax;
    finished_row found = {softmax->factor[i] * block->alpha[i],
                          softmax->shift[i],
                          softmax->exponent[i],
                          block->scale[i],
                          row->largest,
                          softmax->log1p_others[i],
                          softmax->p_top[i],
                          0,
                          -1,
                          -1,
                          block->live[i]};
    if (job->second_pass != GRADIENT || !block->live[i])
        return found;
    int has_gamma = job->target_kind == PROBABILITIES || job->gamma;
    ptrdiff_t label = job->target_kind == LABELS ? block->label[i] : row->top;
    int label_is_top = has_gamma ? label == row->top : block->target_logit[i] == row->largest;
    double beta = job->target_kind == PROBABILITIES ? 0 : job->beta ? job->beta[label] : 1;
    double rest = job->z_loss != 0 ? 2 * job->z_loss * softmax->lse[i] : 0;
    double top_gamma = label_is_top ? beta : 0;
    if (has_gamma) {
        double own = job->target_kind == PROBABILITIES ? row->top_weight : job->gamma[row->top];
        rest += job->target_kind == PROBABILITIES ? value_of(&row->weight) : job->gamma_sum - own;
        top_gamma += own;
    }
    rest += label_is_top ? 0 : beta;
    if (has_gamma || label_is_top) {
        found.top = label_is_top ? label : row->top;
        found.at_top = block->scale[i] * (softmax->p_top[i] * rest - softmax->p_others[i] * top_gamma);
    }
    if (!label_is_top) {
        double p = exp((block->target_logit[i] - row->largest) - softmax->log1p_others[i]);
        double gamma = job->gamma ? job->gamma[label] : 0;
        found.label = label;
        found.at_label = block->alpha[i] * p - block->scale[i] * (beta + gamma);
    }
    return found;
}

/* The second pass of classes first ... last - 1 of the block's row i; returns the sum of the entropy's terms.
 */
static double V(map_classes)(V(block) *block, ptrdiff_t i, const finished_row *done, ptrdiff_t first,
                             ptrdiff_t last)
{
    const softmax_job *job = block->job;
    const array_view *logits = &job->logits, *out = &job->out;
    int in_place = V(is_real)(out) && out->class_stride == (ptrdiff_t)sizeof(V(real));
    compensated entropy = {0, 0};
    V(map_row) row = {V(all)((V(real))done->shift),        V(all)((V(real))done->factor),
                      V(all)((V(real))done->gamma_factor), V(all)((V(real))done->largest),
                      V(all)((V(real))done->log1p_others), V(exp_scale_of)(V(all)((V(real))done->exponent))};
#ifndef REAL_IS_F64
    if (maps_halves(job) && map_half_row(job, V(item)(logits, block->first + i, first), first, last - first,
                                         done, &row, V(item)(out, block->first + i, first)))
        return 0;
#endif
    for (ptrdiff_t c = first, n; c < last; c += n) {
        V(real) *tile = block->out_tile;
        const V(real) *x = NULL, *gamma = NULL, *exps = done->is_live ? V(exps_of)(block, i, c) : NULL;
        n = V(at_most)(last - c, V(CHUNK));
        if (exps) {
            const chunk_scale *kept = V(scale_of)(block, i, c);
            double relative = V(relative_factor)(kept, done);
            row.factor = V(all)((V(real))(done->factor * relative));
            if (relative < 0x1p-60) { /* a factor that is no normal number loses digits */
                exps = NULL;
                row.factor = V(all)((V(real))done->factor);
            }
        }
        if (done->is_live && !exps)
            x = V(run)(logits, V(item)(logits, block->first + i, c), logits->class_stride, n, block->x_tile);
        if (done->is_live && job->second_pass == GRADIENT)
            gamma = V(gamma_run)(block, block->first + i, c, n);
        if (job->second_pass == ENTROPY) {
            add(&entropy, V(row_entropy)(x, n, &row));
            continue;
        }
        char *to = V(item)(out, block->first + i, c);
        const V(exceptions) but = {{done->top - c, done->label - c},
                                   {(V(real))done->at_top, (V(real))done->at_label}};
#ifndef REAL_IS_F64
        if (exps && !gamma && out->itemsize == 2 && out->class_stride == 2 &&
            store_scaled_halves(out->dtype, to, exps, n, row.factor, &but, job->streams))
            continue;
#endif
        if (done->is_live)
            V(row_map)(job->second_pass, x, exps, gamma, tile, n, &row);
        else
            memset(tile, 0, sizeof(V(real)) * (size_t)n);
        V(except)(tile, 0, n, &but);
        if (in_place && job->streams)
            V(stream_run)((V(real) *)to, n, tile);
        else if (in_place)
            memcpy(to, tile, sizeof(V(real)) * (size_t)n);
        else
            V(store_run)(out->dtype, to, out->class_stride, n, tile);
    }
    return value_of(&entropy);
}

/* Leave the row to the writer, if it can be: its exponentials are kept and only need a factor, or its logits
 * are to be logarithms. */
static int V(waits)(V(block) *block, ptrdiff_t i, const finished_row *done)
{
    const softmax_job *job = block->job;
    V(writer) *writer = block->writer;
    int is_plain = (job->second_pass == GRADIENT && job->target_kind == LABELS && !job->gamma) ||
                   job->second_pass == SOFTMAX;
    int is_log = job->second_pass == LOG_SOFTMAX;
    if (!writer || !(is_plain || is_log) || !done->is_live)
        return 0;
    const V(real) *from = V(exps_of)(block, i, 0);
    if (is_log)
        from = (const V(real) *)(void *)V(item)(&job->logits, block->first + i, 0);
    for (ptrdiff_t c = 0; c < job->n_classes && !is_log; c += V(CHUNK))
        if (V(relative_factor)(V(scale_of)(block, i, c), done) < 0x1p-60)
            return 0;
    writer->rows[writer->n_rows++] =
        (V(waiting_row)){(V(real) *)(void *)V(item)(&job->out, block->first + i, 0), from,
                         is_log ? NULL : V(scale_of)(block, i, 0), is_log, *done};
    return 1;
}

static void V(map_by_row)(V(block) *block, ptrdiff_t i)
{
    const softmax_job *job = block->job;
    finished_row done = V(finished)(block, i);
    if (job->parts && job->second_pass != ENTROPY) {
        memcpy(V(part)(job, block->first + i, V(n_parts)(job)), &done, sizeof done);
        return;
    }
    if (V(waits)(block, i, &done))
        return;
    double entropy = V(map_classes)(block, i, &done, 0, job->n_classes);
    if (job->second_pass == ENTROPY)
        put_real(&job->out, V(item)(&job->out, block->first + i, 0), entropy * done.factor);
}

/* With lse given: p is taken relative to it, and 1 - p of the largest is the others' share of it. */
static void V(use_known_lse)(V(block) *block, const double *lse)
{
    row_softmax *softmax = &block->softmax;
    for (ptrdiff_t i = 0; i < block->n; i++) {
        double others = softmax->p_others[i] / softmax->p_top[i];
        double ahead = isfinite(lse[i]) ? block->statistics[i].largest - lse[i] : NAN;
        double shift = fabs(lse[i]) > DIRECT ? (V(real))lse[i] : 0;
        softmax_from_lse(lse[i], shift, V(HEADROOM), LOG2_BASE, softmax, i);
        softmax->log1p_others[i] = -ahead;
        softmax->p_top[i] = exp(ahead);
        softmax->p_others[i] = -expm1(ahead) > 1e-3 ? -expm1(ahead) : others * softmax->p_top[i];
    }
}
#undef V
