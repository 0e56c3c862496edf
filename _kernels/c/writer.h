/* Rows of a result on their way to memory, in one real type; included once for each.
 *
 * Memory takes a result around the cache at its own pace. So rows are written a line at a time while the rows
 * after them are summed: an entry is its exponential, if those are kept, times a factor, but for at most two;
 * or a logit's logarithm of softmax.
 */
#define V(name) PASTE(REAL, name)

/* The entries that are not as the others: `value` at `at`, counted like the classes around it */
typedef struct {
    ptrdiff_t at[2];
    V(real) value[2];
} V(exceptions);

INLINE void V(except)(V(real) *out, ptrdiff_t first, ptrdiff_t n, const V(exceptions) *but)
{
    for (int k = 0; k < 2; k++)
        if (but->at[k] >= first && but->at[k] < first + n)
            out[but->at[k] - first] = but->value[k];
}

/* A row that waits */
typedef struct {
    V(real) *to;
    const V(real) *from; /* exponentials, */
    const chunk_scale *scales;
    int is_log; /* or logits */
    finished_row done;
} V(waiting_row);

/* What makes an entry */
typedef struct {
    V(vector) factor, largest, log1p_others;
} V(written);

INLINE V(vector) V(entry)(V(vector) from, const V(written) *row, int is_log)
{
    return is_log ? (from - row->largest) - row->log1p_others : from * row->factor;
}

typedef struct {
    V(waiting_row) rows[BLOCK_ROWS];
    ptrdiff_t n_rows, row, n_classes, c; /* where the run ends, in row number `row` */
    /* A run of whole lines without exceptions */
    const V(real) *from, *end;
    V(real) *to;
    V(written) entries;
    ptrdiff_t scale_end; /* as far as they are made so */
    /* The beginning of a line that the row after may complete */
    V(real) ALIGNED started[V(LINE)];
    V(real) *started_at;
    ptrdiff_t n_started;
} V(writer);

/* What a chunk's kept exponentials are to be multiplied by: under 2^-60 times the row's factor digits would
 * be lost */
INLINE double V(relative_factor)(const chunk_scale *kept, const finished_row *row)
{
    if (kept->exponent == INFINITY)
        return 1;
    return exp_relative(kept->shift, row->shift, row->exponent - kept->exponent, LOG2_BASE);
}

static void V(end_line)(V(writer) *writer)
{
    V(stream_run)(writer->started_at, writer->n_started, writer->started);
    writer->n_started = 0;
}

/* Write classes c ... c + n - 1 of a row, at most a line: around the cache once its line is complete */
static void V(put_line)(V(writer) *writer, const V(waiting_row) *row, ptrdiff_t c, ptrdiff_t n)
{
    const V(exceptions) but = {{row->done.top, row->done.label},
                               {(V(real))row->done.at_top, (V(real))row->done.at_label}};
    V(real) ALIGNED line[V(LINE)];
    memcpy(line, row->from + c, row->is_log ? sizeof(V(real)) * (size_t)n : sizeof line);
    for (int j = 0; j < V(LINE); j += V(LANES))
        V(store)(line + j, V(entry)(V(load)(line + j), &writer->entries, row->is_log));
    V(except)(line, c, n, &but);
    if (writer->n_started && writer->started_at + writer->n_started != row->to + c)
        V(end_line)(writer);
    if (!writer->n_started)
        writer->started_at = row->to + c;
    if (n < V(LINE))
        V(copy_few)(writer->started + writer->n_started, line, n);
    else
        memcpy(writer->started, line, sizeof line);
    writer->n_started += n;
    if ((uintptr_t)(row->to + c + n) % 64 == 0)
        V(end_line)(writer);
}

/* What makes the entries from class c on; returns where that ends: with the chunks of one scale. */
static ptrdiff_t V(end_of_scale)(V(writer) *writer, const V(waiting_row) *row, ptrdiff_t c)
{
    V(written) *entries = &writer->entries;
    if (row->is_log) {
        entries->largest = V(all)((V(real))row->done.largest);
        entries->log1p_others = V(all)((V(real))row->done.log1p_others);
        return writer->n_classes;
    }
    const chunk_scale *kept = row->scales + c / V(CHUNK), *next = kept + 1;
    ptrdiff_t last = c / V(CHUNK) *V(CHUNK) + V(CHUNK);
    entries->factor = V(all)((V(real))(row->done.factor * V(relative_factor)(kept, &row->done)));
    for (; last < writer->n_classes && next->shift == kept->shift && next->exponent == kept->exponent; next++)
        last += V(CHUNK);
    return last < writer->n_classes ? last : writer->n_classes;
}

/* Find the next run of whole lines, and write what lies before it; none is left where `from` is `end`. */
static __attribute__((noinline)) void V(next_run)(V(writer) *writer)
{
    writer->from = writer->end = NULL;
    for (; writer->row < writer->n_rows; writer->row++, writer->c = 0) {
        const V(waiting_row) *row = writer->rows + writer->row;
        while (writer->c < writer->n_classes) {
            ptrdiff_t c = writer->c;
            if (c == 0 || c == writer->scale_end)
                writer->scale_end = V(end_of_scale)(writer, row, c);
            ptrdiff_t last = writer->scale_end;
            ptrdiff_t to_line = V(to_line)(row->to + c);
            ptrdiff_t stop = c + (last - c) / V(LINE) *V(LINE), at[2] = {row->done.top, row->done.label};
            for (int k = 0; k < 2; k++)
                if (at[k] >= c && at[k] < stop)
                    stop = c + (at[k] - c) / V(LINE) *V(LINE);
            if (to_line == 0 && stop > c) {
                writer->from = row->from + c;
                writer->end = row->from + stop;
                writer->to = row->to + c;
                writer->c = stop;
                return;
            }
            ptrdiff_t n = to_line ? to_line : V(LINE);
            n = n < last - c ? n : last - c;
            V(put_line)(writer, row, c, n);
            writer->c += n;
        }
    }
}

/* Write a line if one waits. The run is the caller's copy, for the registers. */
INLINE void V(write_line)(const V(real) **from, V(real) **to, const V(written) *entries, int is_log)
{
    for (int j = 0; j < V(LINE); j += V(LANES))
        V(stream)(*to + j, V(entry)(V(load)(*from + j), entries, is_log));
    *from += V(LINE);
    *to += V(LINE);
}

/* Write until what is left goes a quarter of a page from where the next rows' logits, at `x`, are read. */
static void V(write_lead)(V(writer) *writer, const char *x)
{
    if (writer->from == writer->end)
        return;
    int is_log = writer->rows[writer->row].is_log;
    for (size_t left = bytes_to(writer->to, x, QUARTER_PAGE); left && writer->from != writer->end; left -= 64)
        V(write_line)(&writer->from, &writer->to, &writer->entries, is_log);
    if (writer->from == writer->end)
        V(next_run)(writer);
}

/* Write all that waits. */
static void V(flush)(V(writer) *writer)
{
    for (; writer->from != writer->end; V(next_run)(writer)) {
        int is_log = writer->rows[writer->row].is_log;
        while (writer->from != writer->end)
            V(write_line)(&writer->from, &writer->to, &writer->entries, is_log);
    }
    writer->n_rows = writer->row = 0;
}
#undef V
