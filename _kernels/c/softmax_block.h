/* A block of rows of the softmax family in one real type: statistics, then loss, then the second pass while
 * the rows are in the cache; included once for each real type.
 *
 * Two ways through, equal in meaning: row by row where classes are contiguous and many (row.h), and a row in
 * each lane for short rows or rows that lie side by side (lanes_block.h). Both work on runs of classes that
 * fit a tile, which is the array itself wherever dtype and strides allow.
 */
#define V(name) PASTE(REAL, name)

typedef struct {
    const softmax_job *job;
    ptrdiff_t first, n;
    int known_lse;
    int64_t label[BLOCK_ROWS];
    int live[BLOCK_ROWS]; /* not ignored */
    double ALIGNED scale[BLOCK_ROWS], alpha[BLOCK_ROWS], target_logit[BLOCK_ROWS];
    row_statistics statistics[BLOCK_ROWS];
    row_softmax softmax;
    V(real) *x_tile, *gamma_tile, *out_tile;
    /* Rows' exponentials, kept for the second pass, and the scales of their chunks; or NULL */
    V(real) *exps;
    chunk_scale *scales;
    V(following) seen; /* of the chunk or row to come */
    V(writer) *writer; /* of the rows before, or NULL */
} V(block);

INLINE char *V(item)(const array_view *view, ptrdiff_t row, ptrdiff_t c)
{
    return view->data + view_offset(view, row) + c * view->class_stride;
}

INLINE ptrdiff_t V(at_most)(ptrdiff_t n, ptrdiff_t bound) { return n < bound ? n : bound; }

/* The coefficient of one class: its probability with target_scale and offset applied, times its weight */
INLINE void V(weigh_target)(const softmax_job *job, const V(real) *t, V(real) weight, V(real) *gamma)
{
    *gamma = weight * ((V(real))job->target_scale * *t + (V(real))job->target_offset);
}

/* gamma of one row from first_class on, or NULL for zeros */
static const V(real) *V(gamma_run)(V(block) *block, ptrdiff_t row, ptrdiff_t first_class, ptrdiff_t n)
{
    const softmax_job *job = block->job;
    const V(real) *weight = job->gamma_real ? (const V(real) *)job->gamma_real + first_class : NULL;
    if (job->target_kind != PROBABILITIES)
        return weight;
    const V(real) *t = V(run)(&job->target, V(item)(&job->target, row, first_class), job->target.class_stride,
                              n, block->gamma_tile);
    if (!weight && job->target_scale == 1 && job->target_offset == 0)
        return t;
    for (ptrdiff_t c = 0; c < n; c++)
        V(weigh_target)(job, t + c, weight ? weight[c] : 1, block->gamma_tile + c);
    return block->gamma_tile;
}

/* Where the exponentials of a row's chunk are kept, and their scale; NULL if they are not */
INLINE V(real) *V(exps_of)(const V(block) *block, ptrdiff_t i, ptrdiff_t first_class)
{
    ptrdiff_t n_groups = (block->job->n_classes + V(GROUP) - 1) / V(GROUP);
    return block->exps ? block->exps + i * n_groups * V(GROUP) + first_class : NULL;
}

INLINE chunk_scale *V(scale_of)(const V(block) *block, ptrdiff_t i, ptrdiff_t first_class)
{
    ptrdiff_t n_chunks = (block->job->n_classes + V(CHUNK) - 1) / V(CHUNK);
    return block->scales + i * n_chunks + first_class / V(CHUNK);
}

static void V(find_target_logits)(V(block) *block)
{
    const array_view *logits = &block->job->logits;
    for (ptrdiff_t i = 0; i < block->n && block->job->target_kind == LABELS; i++)
        if (block->live[i])
            block->target_logit[i] = view_real(logits, V(item)(logits, block->first + i, block->label[i]));
}

/* Rows whose results follow without a look at all their logits: ignored ones, and those whose lse is known,
 * unless their label is so likely that 1 - p must be summed from the others. Their statistics are the
 * label's. */
static int V(needs_no_pass)(V(block) *block, ptrdiff_t i)
{
    const softmax_job *job = block->job;
    if (job->target_kind != LABELS)
        return 0;
    int ignored = !block->live[i] && !job->lse.data;
    if (!ignored && !(block->known_lse && block->live[i] &&
                      -expm1(block->target_logit[i] - block->softmax.lse[i]) > 1e-3))
        return 0;
    row_statistics *row = block->statistics + i;
    *row = (row_statistics){.largest = ignored ? 0 : block->target_logit[i],
                            .top = ignored ? 0 : block->label[i]};
    row->top_weight = job->gamma ? job->gamma[row->top] : 0;
    return 1;
}

/* A long row is split into parts of SEGMENT classes, of which the statistics are merged in order. If threads
 * share them, they lie in job->parts, those of a row together, and behind them the finished row. */
INLINE ptrdiff_t V(n_parts)(const softmax_job *job) { return (job->n_classes + SEGMENT - 1) / SEGMENT; }

INLINE void *V(part)(const softmax_job *job, ptrdiff_t row, ptrdiff_t part)
{
    return (char *)job->parts + (row * (V(n_parts)(job) + 1) + part) * PART_BYTES;
}

static row_statistics V(part_statistics)(V(block) *block, ptrdiff_t i, ptrdiff_t part)
{
    const softmax_job *job = block->job;
    const array_view *logits = &job->logits;
    ptrdiff_t end = V(at_most)(job->n_classes, (part + 1) * SEGMENT);
    row_statistics row = {.largest = -INFINITY};
#ifndef REAL_IS_F64
    int is_plain = logits->itemsize == 2 && logits->class_stride == 2 && !job->gamma &&
                   job->target_kind != PROBABILITIES;
#endif
    for (ptrdiff_t c = part * SEGMENT, n; c < end; c += n) {
        const char *item = V(item)(logits, block->first + i, c);
        V(real) *exps = V(exps_of)(block, i, c);
        n = V(at_most)(end - c, V(CHUNK));
#ifndef REAL_IS_F64
        if (is_plain && !exps && add_halves(&row, logits->dtype, item, n))
            continue;
#endif
        const V(real) *x = V(run)(logits, item, logits->class_stride, n, block->x_tile);
        const V(real) *next = x + n;
        ptrdiff_t n_next = V(at_most)(end - c - n, V(CHUNK));
        if (n_next == 0 && part == 0 && i + 1 < block->n) {
            next = (const V(real) *)V(item)(logits, block->first + i + 1, 0);
            n_next = V(at_most)(job->n_classes, V(CHUNK));
        }
        if (x == block->x_tile) { /* the sum's own prefetches go by the logits of float32 */
            n_next = 0;
            for (ptrdiff_t line = 0; line < n * logits->class_stride; line += 64)
                __builtin_prefetch(item + n * logits->class_stride + line);
        }
        V(add_chunk)(&row, x, V(gamma_run)(block, block->first + i, c, n), n, c, exps, &block->seen, next,
                     n_next, block->writer);
        if (exps)
            *V(scale_of)(block, i, c) = (chunk_scale){row.shift, row.exponent};
    }
    return row;
}

static void V(find_row)(V(block) *block, ptrdiff_t i)
{
    const softmax_job *job = block->job;
    for (ptrdiff_t part = 0; part < V(n_parts)(job); part++) {
        row_statistics found;
        if (job->parts)
            memcpy(&found, V(part)(job, block->first + i, part), sizeof found);
        else
            found = V(part_statistics)(block, i, part);
        if (part)
            merge(block->statistics + i, &found, LOG2_BASE);
        else
            block->statistics[i] = found;
    }
}

static void V(find_statistics)(V(block) *block)
{
    for (ptrdiff_t i = 0; i < block->n; i++)
        if (!V(needs_no_pass)(block, i))
            V(find_row)(block, i);
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
        if (job->hit.data) {
            int hit = block->live[i] && block->label[i] == row->top && !isnan(lse);
            put_real(&job->hit, V(item)(&job->hit, block->first + i, 0), hit);
        }
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
                          job->second_pass == SOFTMAX ? row->top : -1,
                          -1,
                          block->live[i]};
    if (job->second_pass != GRADIENT || !block->live[i])
        return found;
    ptrdiff_t label = job->target_kind == LABELS ? block->label[i] : row->top;
    double beta = job->target_kind == PROBABILITIES ? 0 : job->beta ? job->beta[label] : 1;
    double z_slope = job->z_loss != 0 ? 2 * job->z_loss * softmax->lse[i] : 0;
    double top_gamma = job->target_kind == PROBABILITIES ? row->top_weight
                       : job->gamma                      ? job->gamma[row->top]
                                                         : 0;
    double rest = job->target_kind == PROBABILITIES ? value_of(&row->weight)
                  : job->gamma                      ? job->gamma_sum - top_gamma
                                                    : 0;
    top_gamma += label == row->top ? beta : 0;
    rest += z_slope + (label == row->top ? 0 : beta);
    found.top = row->top;
    found.at_top = block->scale[i] * (softmax->p_top[i] * rest - softmax->p_others[i] * top_gamma);
    if (label != row->top) {
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
    double entropy = 0;
    V(map_row) row = {V(all)((V(real))done->shift),        V(all)((V(real))done->factor),
                      V(all)((V(real))done->gamma_factor), V(all)((V(real))done->largest),
                      V(all)((V(real))done->log1p_others), V(exp_scale_of)(V(all)((V(real))done->exponent))};
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
            entropy += V(row_entropy)(x, n, &row);
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
        if (in_place)
            V(copy_out)((V(real) *)to, tile, n, job->streams);
        else
            V(store_run)(out->dtype, to, out->class_stride, n, tile);
    }
    return entropy;
}

/* Leave the row to the writer, if it can be: its exponentials are kept and only need a factor. */
static int V(waits)(V(block) *block, ptrdiff_t i, const finished_row *done)
{
    const softmax_job *job = block->job;
    V(writer) *writer = block->writer;
    int is_plain = (job->second_pass == GRADIENT && job->target_kind == LABELS && !job->gamma) ||
                   job->second_pass == SOFTMAX;
    if (!writer || !is_plain || !done->is_live)
        return 0;
    for (ptrdiff_t c = 0; c < job->n_classes; c += V(CHUNK))
        if (V(relative_factor)(V(scale_of)(block, i, c), done) < 0x1p-60)
            return 0;
    writer->rows[writer->n_rows++] =
        (V(waiting_row)){(V(real) *)(void *)V(item)(&job->out, block->first + i, 0), V(exps_of)(block, i, 0),
                         V(scale_of)(block, i, 0), *done};
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
        softmax_from_lse(lse[i], DIRECT, V(HEADROOM), LOG2_BASE, softmax, i);
        softmax->log1p_others[i] = -ahead;
        softmax->p_top[i] = exp(ahead);
        softmax->p_others[i] = -expm1(ahead) > 1e-3 ? -expm1(ahead) : others * softmax->p_top[i];
    }
}

/* The block's rows, all passes; returns 0 if a label is bad. */
static int V(do_rows)(V(block) *block, block_result *result)
{
    const softmax_job *job = block->job;
    double ALIGNED lse[BLOCK_ROWS];
    block->known_lse = job->lse_in.data != NULL;
    if (job->target_kind == LABELS &&
        rows_labels(job, block->first, block->n, block->label, result) < block->n)
        return 0;
    if (block->known_lse)
        memcpy(lse, f64_items(&job->lse_in, block->first, block->n, block->softmax.lse),
               sizeof(double) * (size_t)block->n);
    if (job->scale.data)
        memcpy(block->scale, f64_items(&job->scale, block->first, block->n, block->alpha),
               sizeof(double) * (size_t)block->n);
    for (ptrdiff_t i = 0; i < block->n; i++) {
        block->live[i] = job->target_kind != LABELS || block->label[i] != job->ignore_index;
        block->softmax.lse[i] = block->known_lse ? lse[i] : 0;
        if (!job->scale.data)
            block->scale[i] = 1;
        result->counted += block->live[i];
    }
    if (block->known_lse)
        V(find_target_logits)(block);
    V(find_statistics)(block);
    if (!block->known_lse) /* now that the rows are in the cache */
        V(find_target_logits)(block);
    softmax_of(block->statistics, block->n, V(HEADROOM), LOG2_BASE, &block->softmax);
    if (block->known_lse)
        V(use_known_lse)(block, lse);
    result->total += V(find_losses)(block);
    if (block->writer)
        V(flush)(block->writer);
    for (ptrdiff_t i = 0; i < block->n && job->second_pass != NOTHING; i++)
        V(map_by_row)(block, i);
    if (block->writer)
        V(next_run)(block->writer);
    return 1;
}

static void V(rows_block)(const softmax_job *job, V(real) (*tile)[V(CHUNK)], V(block) *block)
{
    block->job = job;
    block->x_tile = tile[0];
    block->gamma_tile = tile[1];
    block->out_tile = tile[2];
    block->exps = NULL;
    block->seen.x = NULL;
    block->writer = NULL;
}

static void V(softmax_block)(const softmax_job *job, ptrdiff_t number, void *scratch, block_result *result)
{
    V(real) ALIGNED tile[3][V(CHUNK)];
    V(block) block;
    V(writer) writer;
    if (lanes_rows(job)) {
        V(lanes_block)(job, number, result);
        return;
    }
    V(rows_block)(job, tile, &block);
    writer.n_classes = job->n_classes;
    writer.n_rows = writer.row = writer.c = writer.n_started = 0;
    writer.from = writer.end = NULL;
    if (job->streams && job->keeps_exps && V(is_real)(&job->out) &&
        job->out.class_stride == (ptrdiff_t)sizeof(V(real)))
        block.writer = &writer;
    ptrdiff_t first = number * job->block_rows, last = V(at_most)(job->n_rows, first + job->block_rows);
    for (int half = 0; first < last; first += job->rows_at_once, half = !half) {
        block.first = first;
        block.n = V(at_most)(last - first, job->rows_at_once);
        block.seen.x = NULL;
        if (job->keeps_exps) { /* while those of the rows before are written */
            block.scales = (chunk_scale *)scratch + half * (KEPT_SCALES_BYTES / 2 / sizeof(chunk_scale));
            block.exps = (V(real) *)((char *)scratch + KEPT_SCALES_BYTES + (size_t)half * job->kept_bytes);
        }
        if (!V(do_rows)(&block, result))
            break;
    }
    if (block.writer)
        V(flush)(&writer);
    if (block.writer && writer.n_started)
        V(end_line)(&writer);
    fence();
}

/* The part's statistics, or once the row is finished its second pass */
static void V(softmax_part)(const softmax_job *job, ptrdiff_t number, int is_finished)
{
    V(real) ALIGNED tile[3][V(CHUNK)];
    V(block) block;
    ptrdiff_t n_parts = V(n_parts)(job), part = number % n_parts;
    V(rows_block)(job, tile, &block);
    block.first = number / n_parts;
    block.n = 1;
    if (is_finished) {
        finished_row done;
        memcpy(&done, V(part)(job, block.first, n_parts), sizeof done);
        V(map_classes)(&block, 0, &done, part * SEGMENT, V(at_most)(job->n_classes, (part + 1) * SEGMENT));
        fence();
    } else {
        row_statistics row = V(part_statistics)(&block, 0, part);
        memcpy(V(part)(job, block.first, part), &row, sizeof row);
    }
}
#undef V
