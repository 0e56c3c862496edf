/* Gradients of rows whose loss is plain (lanes_labels.h), written while the next rows are summed: memory then
 * takes them while the processor computes. Included once for each real type.
 *
 * A gradient is the row's factor times the exponentials, with minus the sum of the others in the label's
 * place. Exponentials lie as lanes, or flat: as the logits of short rows do that lie one after another. Those
 * are taken where they stand, each relative to its own row's first logit, so that only their sums need the
 * rows as lanes.
 */
#define V(name) PASTE(REAL, name)

/* Flat rows are taken this many vectors' lanes at a time; in each run of LANES rows a class's reals belong to
 * rows in the same pattern. */
enum { V(RUNS) = 4, V(RUNS_ROWS) = V(RUNS) *V(LANES) };

/* One class's gradients of a line of rows from `lane` on, to `to` */
INLINE void V(unwritten_line)(const V(unwritten) *left, ptrdiff_t lane, ptrdiff_t c, V(real) *to, int streams)
{
    const V(real) *power = left->power + c * left->stride + lane, *factor = left->factor + lane;
    for (ptrdiff_t i = 0; i < V(LINE); i += V(LANES))
        if (streams)
            V(stream)(to + i, V(load)(power + i) * V(load)(factor + i));
        else
            V(store)(to + i, V(load)(power + i) * V(load)(factor + i));
}

/* The next n lines of gradients, class after class. What of a class ends amid a line waits for the rows that
 * follow. */
INLINE void V(write_class_lines)(V(unwritten) *left, ptrdiff_t n)
{
    while (n > 0 && left->done < left->n_classes) {
        const ptrdiff_t c = left->done;
        V(real) *out = left->out + c * left->out_stride, *line = left->carried[c];
        ptrdiff_t head = V(to_line)(out), lane = head + left->done_in_class;
        if (lane == head && head > 0) {
            V(unwritten_line)(left, 0, c, line + V(LINE) - head, 0);
            if (left->continues)
                V(stream_run)(out + head - V(LINE), V(LINE), line);
            else
                V(copy_few)(out, line + V(LINE) - head, head);
        }
        for (; n > 0 && lane + V(LINE) <= left->n; n--, lane += V(LINE))
            V(unwritten_line)(left, lane, c, out + lane, 1);
        left->done_in_class = lane - head;
        if (lane + V(LINE) > left->n) {
            V(unwritten_line)(left, lane, c, line, 0);
            left->done++, left->done_in_class = 0;
        }
    }
}

/* The c-th vectors of flat runs times factors, and what is whole lines of the runs before to `out` */
INLINE void V(write_runs)(V(unwritten) *left, ptrdiff_t row, ptrdiff_t c, V(ivector) row_of)
{
    const ptrdiff_t run = left->n_classes * V(LANES);
    V(real) *power = left->power + row * left->n_classes + c * V(LANES);
    ptrdiff_t at = left->head + (row - V(RUNS_ROWS))*left->n_classes + c * V(RUNS_ROWS);
    if (row < left->n)
#pragma GCC unroll 4
        for (int i = 0; i < V(RUNS); i++) {
            V(vector) factor = V(spread)(left->factor + row + i * V(LANES), row_of);
            V(store)(power + i * run, V(load)(power + i * run) * factor);
        }
#pragma GCC unroll 4
    for (int i = 0; i < V(RUNS); i++, at += V(LANES)) {
        if (row == 0 || at >= left->tail)
            continue;
        if (left->streams)
            V(stream)(left->out + at, V(load)(left->power + at));
        else
            V(store)(left->out + at, V(load)(left->power + at));
    }
}

/* Of a run's vectors, each lane's row */
static void V(place_rows)(V(bits) *row_of, ptrdiff_t n_classes)
{
    for (V(bits) row = 0; row < V(LANES); row++)
        for (ptrdiff_t c = 0; c < n_classes; c++)
            *row_of++ = row;
}

/* The exponentials of flat rows at x, to `power`; meanwhile the rows before are written, and the next block's
 * logits fetched. */
static void V(flat_powers)(V(lanes) *rows, const V(real) *x, const V(real) *next_block, V(real) *power)
{
    const ptrdiff_t n_classes = rows->job->n_classes, size = sizeof(V(real));
    V(unwritten) *left = &rows->unwritten;
    V(real) ALIGNED magic[V(RUNS_ROWS)], floor[V(RUNS_ROWS)];
    for (ptrdiff_t i = 0; i < rows->n; i++)
        rows->largest[i] = x[i * n_classes];
    for (ptrdiff_t row = 0; row < rows->n; row += V(RUNS_ROWS), left->done = row) {
        const V(real) *from = x + row * n_classes;
        V(real) *to = power + row * n_classes, *first = rows->largest + row;
        ptrdiff_t missing = row + V(RUNS_ROWS) - rows->n;
        if (missing > 0) {
            ptrdiff_t there = rows->n - row;
            memcpy(to, from, (size_t)(there * n_classes * size));
            memset(to + there * n_classes, 0, (size_t)(missing * n_classes * size));
            memset(first + there, 0, (size_t)(missing * size));
            from = to;
        }
        for (int i = 0; i < V(RUNS_ROWS); i += V(LANES)) {
            V(exp_scale) scale = V(exp_scale_of)(V(first_exponent)(V(load)(first + i)));
            V(store)(magic + i, scale.magic);
            V(store)(floor + i, scale.floor);
        }
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(ivector) row_of = V(load_bits)(rows->row_of + c * V(LANES)), is_lost[V(RUNS)];
            V(vector) e[V(RUNS)];
            V(exp_scale) scale[V(RUNS)];
#pragma GCC unroll 4
            for (int i = 0; i < V(RUNS); i++) {
                scale[i] = (V(exp_scale)){V(spread)(magic + i * V(LANES), row_of),
                                          V(spread)(floor + i * V(LANES), row_of)};
                e[i] = V(load)(from + (i * n_classes + c) * V(LANES));
            }
            V(exps_fine)(e, V(RUNS), scale, 1, is_lost);
#pragma GCC unroll 4
            for (int i = 0; i < V(RUNS); i++) {
                ptrdiff_t at = (i * n_classes + c) * V(LANES);
                if (at % V(LINE) == 0)
                    __builtin_prefetch(next_block + row * n_classes + at, 0, 2);
                V(store)(to + at, (V(vector))((V(ivector))e[i] | is_lost[i]));
            }
            if (left->n)
                V(write_runs)(left, row, c, row_of);
        }
    }
}

/* What is still to be written of the rows before, but what ends amid a line */
static void V(write_rest)(V(lanes) *rows)
{
    V(unwritten) *left = &rows->unwritten;
    if (left->n && left->is_flat) {
        for (; left->done < left->n + V(RUNS_ROWS); left->done += V(RUNS_ROWS))
            for (ptrdiff_t c = 0; c < left->n_classes; c++)
                V(write_runs)(left, left->done, c, V(load_bits)(rows->row_of + c * V(LANES)));
        if (left->head > 0)
            V(copy_few)(left->out, left->power, left->head);
        left->end = left->out + left->n * left->n_classes;
    } else if (left->n) {
        V(write_class_lines)(left, left->n_classes * left->n);
        left->end = left->out + left->n;
    }
    left->n = left->done = left->done_in_class = 0;
}

/* What ended amid a line and is followed by no more rows */
static void V(write_carried)(V(unwritten) *left)
{
    if (left->end && left->is_flat) {
        V(copy_few)(left->out + left->tail, left->power + left->tail, left->end - (left->out + left->tail));
    } else if (left->end) {
        for (ptrdiff_t c = 0; c < left->n_classes; c++) {
            V(real) *end = left->end + c * left->out_stride;
            ptrdiff_t n = (V(LINE) - V(to_line)(end)) % V(LINE);
            V(copy_few)(end - n, left->carried[c], n);
        }
    }
    left->end = NULL;
}

/* Leave the gradients of these rows, whose exponentials are in x_tile, or flat at `power`, for later. */
static void V(leave_gradients)(V(lanes) *rows, V(real) *flat_power)
{
    const softmax_job *job = rows->job;
    V(unwritten) *left = &rows->unwritten;
    const size_t size = sizeof(V(real)) * (size_t)rows->width;
    V(real) *out = (V(real) *)V(place)(&job->out, rows->first, 0);
    left->continues = left->end == out && left->is_flat == (flat_power != NULL);
    if (!left->continues)
        V(write_carried)(left);
    memcpy(left->factor, rows->factor, size);
    if (flat_power) {
        ptrdiff_t n = rows->n * job->n_classes, head = V(to_line)(out);
        left->head = head < n ? head : n;
        if (left->continues) { /* the line begins before these rows */
            left->head = left->tail - (left->end - left->out);
            memcpy(flat_power + left->head, left->power + left->tail, sizeof *out * (size_t)-left->head);
        }
        left->tail = left->head + (n - left->head) / V(LINE) *V(LINE);
        left->power = flat_power;
    } else {
        left->power = rows->x_tile;
        left->stride = V(tile_stride)(rows);
        left->out_stride = job->out.class_stride / (ptrdiff_t)sizeof(V(real));
        rows->x_tile = rows->gamma_tile;
        rows->gamma_tile = left->power;
    }
    const ptrdiff_t row_step = flat_power ? job->n_classes : 1, class_step = flat_power ? 1 : left->stride;
    for (ptrdiff_t i = 0; i < rows->n; i++)
        if (rows->label[i] >= 0)
            left->power[i * row_step + rows->label[i] * class_step] = -rows->sum[i];
    left->is_flat = flat_power != NULL;
    left->streams = job->streams;
    left->n = rows->n;
    left->n_classes = job->n_classes;
    left->out = out;
}
#undef V
