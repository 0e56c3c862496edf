/* The first pass over a block of rows in one real type: where its operands lie, and the statistics of each
 * row; included once for each real type. Contiguous classes of the real type are read in place, others by way
 * of a tile.
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
#ifndef REAL_IS_F64
    half_following seen_half;
#endif
    V(writer) *writer; /* of the rows before, or NULL */
} V(block);

INLINE char *V(item)(const array_view *view, ptrdiff_t row, ptrdiff_t c)
{
    ptrdiff_t offset = view->ndim == 1 ? row * view->stride[0] : view_offset(view, row);
    return view->data + offset + c * view->class_stride;
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

static void V(find_target_logit)(V(block) *block, ptrdiff_t i)
{
    const array_view *logits = &block->job->logits;
    if (!block->live[i])
        return;
    const char *item = V(item)(logits, block->first + i, block->label[i]);
    V(real) logit;
    if (V(is_real)(logits))
        memcpy(&logit, item, sizeof logit);
    block->target_logit[i] = V(is_real)(logits) ? logit : view_real(logits, item);
}

static void V(find_target_logits)(V(block) *block)
{
    for (ptrdiff_t i = 0; i < block->n && block->job->target_kind == LABELS; i++)
        V(find_target_logit)(block, i);
}

/* The same of a row that is to be ranked; that of the row after the next is on its way meanwhile. */
INLINE void V(find_ranked_logit)(V(block) *block, ptrdiff_t i)
{
    ptrdiff_t ahead = i + 2;
    if (ahead < block->n && block->live[ahead])
        __builtin_prefetch(V(item)(&block->job->logits, block->first + ahead, block->label[ahead]));
    V(find_target_logit)(block, i);
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
    if (!ignored && !(block->known_lse && block->live[i] && !job->gamma &&
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

INLINE V(real) V(next_below)(V(real) x)
{
    V(bits) bits;
    x += 0; /* of -0 that of 0 */
    memcpy(&bits, &x, sizeof x);
    bits = x > 0 ? bits - 1 : x < 0 ? bits + 1 : (V(bits))((V(bits))1 << (8 * (int)sizeof x - 1) | 1);
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void V(part_statistics)(V(block) *block, ptrdiff_t i, ptrdiff_t part, row_statistics *row)
{
    const softmax_job *job = block->job;
    const array_view *logits = &job->logits;
    ptrdiff_t end = V(at_most)(job->n_classes, (part + 1) * SEGMENT);
    int has_gamma = job->gamma_real || job->target_kind == PROBABILITIES;
    V(ranking) ranking;
    begin(row);
    if (job->figures) {
        ranking.logit = (V(real))block->target_logit[i];
        ranking.below = V(next_below)(ranking.logit);
    }
#ifndef REAL_IS_F64
    int is_plain = logits->itemsize == 2 && logits->class_stride == 2 && job->n_classes >= HALF_CLASSES &&
                   !job->gamma && job->target_kind != PROBABILITIES &&
                   job->second_pass != ENTROPY; /* in which errors cancel that both passes share */
#endif
    for (ptrdiff_t c = part * SEGMENT, n; c < end; c += n) {
        if (job->figures)
            ranking.label = block->label[i] - c;
        const char *item = V(item)(logits, block->first + i, c);
        V(real) *exps = V(exps_of)(block, i, c);
#ifndef REAL_IS_F64
        n = V(at_most)(end - c, HALF_CHUNK);
        if (is_plain && !exps) {
            int is_last = c + n == job->n_classes && i + 1 < block->n;
            const char *next = is_last ? V(item)(logits, block->first + i + 1, 0) : item + 2 * n;
            ptrdiff_t n_next = V(at_most)(is_last ? job->n_classes : end - c - n, HALF_CHUNK);
            if (add_halves(row, logits->dtype, item, n, c, next, n_next, &block->seen_half,
                           job->figures ? &ranking : NULL))
                continue;
        }
#endif
        n = V(at_most)(end - c, V(CHUNK));
        const V(real) *x = V(run)(logits, item, logits->class_stride, n, block->x_tile);
        const char *next = item + n * logits->class_stride;
        ptrdiff_t n_next = V(at_most)(end - c - n, V(CHUNK));
        if (n_next == 0 && part == 0 && i + 1 < block->n) {
            next = V(item)(logits, block->first + i + 1, 0);
            n_next = V(at_most)(job->n_classes, V(CHUNK));
        }
        if (x == block->x_tile && !V(has_seconds)(logits)) { /* the sum's own prefetches go by reals */
            V(prefetch_run)(next, logits->class_stride, n_next);
            n_next = 0;
        }
        const V(real) *gamma = has_gamma ? V(gamma_run)(block, block->first + i, c, n) : NULL;
        V(add_chunk)(row, x, gamma, n, c, exps, &block->seen, (const V(real) *)next, n_next, block->writer,
                     job->figures ? &ranking : NULL);
        if (exps) {
            int is_nothing = row->largest == -INFINITY;
            *V(scale_of)(block, i, c) = (chunk_scale){row->shift, is_nothing ? INFINITY : row->exponent};
        }
    }
}

static void V(find_row)(V(block) *block, ptrdiff_t i)
{
    const softmax_job *job = block->job;
    row_statistics *row = block->statistics + i, found;
    for (ptrdiff_t part = 0; part < V(n_parts)(job); part++) {
        row_statistics *to = part ? &found : row;
        if (job->parts)
            memcpy(to, V(part)(job, block->first + i, part), sizeof *to);
        else
            V(part_statistics)(block, i, part, to);
        if (part)
            merge(row, &found, LOG2_BASE);
    }
}

static void V(find_statistics)(V(block) *block)
{
    for (ptrdiff_t i = 0; i < block->n; i++) {
        if (block->job->figures)
            V(find_ranked_logit)(block, i);
        if (!V(needs_no_pass)(block, i))
            V(find_row)(block, i);
    }
}
#undef V
