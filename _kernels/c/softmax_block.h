/* A block of rows of the softmax family in one real type; included once for each.
 *
 * Two ways through, equal in meaning: row by row where classes are contiguous and many (row.h and the
 * row_*.h), and a row in each lane for short rows or rows that lie side by side (lanes_block.h).
 */
#define V(name) PASTE(REAL, name)

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
        block->target_logit[i] = 0;
        block->softmax.lse[i] = block->known_lse ? lse[i] : 0;
        if (!job->scale.data)
            block->scale[i] = 1;
        result->counted += block->live[i];
    }
    if (block->known_lse)
        V(find_target_logits)(block);
    if (block->writer)
        V(write_lead)(block->writer, V(item)(&job->logits, block->first, 0));
    V(find_statistics)(block);
    if (!block->known_lse && !job->figures) /* now that the rows are in the cache */
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

/* Of short rows as many rows, as there may be others between them */
static distances V(rows_ahead)(const array_view *logits, ptrdiff_t n_classes)
{
    ptrdiff_t bytes = n_classes * (ptrdiff_t)sizeof(V(real));
    ptrdiff_t stride = logits->ndim > 0 ? logits->stride[logits->ndim - 1] : 0;
    if (bytes >= farther(in_order) || stride == bytes || bytes == 0)
        return in_order;
    return (distances){(in_order.first + bytes - 1) / bytes * stride,
                       (in_order.second + bytes - 1) / bytes * stride};
}

static void V(rows_block)(const softmax_job *job, V(real) (*tile)[V(CHUNK)], V(block) *block)
{
    block->job = job;
    block->x_tile = tile[0];
    block->gamma_tile = tile[1];
    block->out_tile = tile[2];
    block->exps = NULL;
    block->seen.x = NULL;
    block->seen.rows = V(rows_ahead)(&job->logits, job->n_classes);
#ifndef REAL_IS_F64
    block->seen_half.x = NULL;
#endif
    block->writer = NULL;
}

static void V(softmax_block)(const softmax_job *job, ptrdiff_t number, void *scratch, block_result *result)
{
    V(real) ALIGNED tile[3][V(CHUNK)];
    V(block) block;
    V(writer) writer;
    FRESH(tile), FRESH(block), FRESH(writer);
    if (lanes_rows(job)) {
        V(lanes_block)(job, number, result);
        return;
    }
    V(rows_block)(job, tile, &block);
    writer.n_classes = job->n_classes;
    writer.n_rows = writer.row = writer.c = writer.n_started = 0;
    writer.from = writer.end = NULL;
    int is_log = job->second_pass == LOG_SOFTMAX && V(is_real)(&job->logits) &&
                 job->logits.class_stride == (ptrdiff_t)sizeof(V(real));
    if (job->streams && (job->keeps_exps || is_log) && V(is_real)(&job->out) &&
        job->out.class_stride == (ptrdiff_t)sizeof(V(real)))
        block.writer = &writer;
    int keeps_exps = job->keeps_exps;
#ifndef REAL_IS_F64
    keeps_exps = keeps_exps && !maps_halves(job);
#endif
    ptrdiff_t first = number * job->block_rows, last = V(at_most)(job->n_rows, first + job->block_rows);
    for (int half = 0; first < last; first += job->rows_at_once, half = !half) {
        block.first = first;
        block.n = V(at_most)(last - first, job->rows_at_once);
        block.seen.x = NULL;
        if (keeps_exps) { /* while those of the rows before are written */
            block.scales = (chunk_scale *)scratch + half * (KEPT_SCALES_BYTES / 2 / sizeof(chunk_scale));
            char *exps = (char *)scratch + KEPT_SCALES_BYTES + (size_t)half * job->kept_bytes;
            exps += bytes_to(exps, V(item)(&job->logits, first, 0), (1 + 2 * half) * QUARTER_PAGE);
            block.exps = (V(real) *)(void *)exps;
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
    FRESH(tile), FRESH(block);
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
        row_statistics row;
        block_result bad;
        block.target_logit[0] = 0;
        block.live[0] = job->figures && rows_labels(job, block.first, 1, block.label, &bad) == 1 &&
                        block.label[0] != job->ignore_index;
        V(find_target_logit)(&block, 0);
        V(part_statistics)(&block, 0, part, &row);
        memcpy(V(part)(job, block.first, part), &row, sizeof row);
    }
}

static void V(part_block)(const softmax_job *job, ptrdiff_t number, int is_finished)
{
    if (job->part_classes)
        V(lanes_part_block)(job, number, is_finished);
    else
        V(softmax_part)(job, number, is_finished);
}
#undef V
