/* Rows whose classes lie next to each other, in one real type; included once for each.
 *
 * add_chunk reads some classes once, as many as the first cache holds with ease. Their largest is known by
 * then: it was sought while the chunk before was summed, so memory and arithmetic work at the same time. If
 * it is the row's, its predecessor joins the others. Then the chunk's exponentials are added to the sum in
 * few long runs of one flat loop, since what stands around a loop takes its time too, and kept for the second
 * pass where that is asked for. The group that holds the largest is summed from a copy without it.
 */
#define V(name) PASTE(REAL, name)

enum {
    V(GROUP) = 2 * V(LANES),
    V(CHAIN) = 8, /* groups: what one chain of additions adds up */
    /* The largest exponential of a row is about 2^HEADROOM, so that those of classes whose probability is no
     * normal number still are. */
    V(HEADROOM) = sizeof(V(real)) == 8 ? 60 : 30
};

/* Without it memory and arithmetic take turns. Past the row's end it fetches the next row, or nothing. */
#define PREFETCH_BYTES 8192

/* How far the sum's exponent may stay behind a larger logit's before it is raised; far from overflow. */
#define MARGIN 40

/* The scale of a row's exponentials, from its statistics */
INLINE V(exp_scale) V(row_scale)(const row_statistics *row)
{
    return V(exp_scale_of)(V(all)((V(real))row->exponent));
}

/* Make `largest` the row's; its predecessor joins the others. The exponent stays if it can. */
INLINE void V(raise_largest)(row_statistics *row, V(real) largest, ptrdiff_t top, double top_weight)
{
    row_statistics next = {.largest = largest, .top = top, .top_weight = top_weight};
    int is_first = row->largest == -INFINITY && row->sum.sum == 0; /* not NaN either */
    if (!is_first && row->shift == 0 && fabs(largest) <= DIRECT &&
        largest * LOG2_BASE - V(HEADROOM) <= row->exponent + MARGIN) {
        next.exponent = row->exponent;
    } else if (fabs(largest) <= DIRECT) {
        next.exponent = rint(largest * LOG2_BASE) - V(HEADROOM);
    } else if (largest < INFINITY) {
        next.shift = largest;
        next.exponent = -V(HEADROOM);
    }
    if (is_first)
        *row = next;
    else
        merge(row, &next, LOG2_BASE);
}

static int V(has_nan)(const V(real) *x, ptrdiff_t n)
{
    int found = 0;
    for (ptrdiff_t c = 0; c < n; c++)
        found |= isnan(x[c]);
    return found;
}

/* A chunk as runs of whole groups: those before the group that holds the row's largest and those after it,
 * then copies of what ends within a group, filled up with `filler`, and of that group with `filler` in the
 * place of the largest. */
typedef struct {
    const V(real) *from;
    ptrdiff_t at, n; /* where it starts in the chunk, and how many reals it has */
} V(run_of_groups);

typedef struct {
    const V(real) *x;
    V(real) filler;
    ptrdiff_t n, n_whole, n_runs; /* n_whole: reals in whole groups */
    V(run_of_groups) runs[5];
    V(real) *last; /* the last group */
    V(real) ALIGNED end[2 * V(GROUP)], copy[V(GROUP)];
} V(chunk);

INLINE void V(copy_group)(V(real) *to, const V(real) *x)
{
    for (int j = 0; j < V(GROUP); j += V(LANES))
        V(store)(to + j, V(load)(x + j));
}

static void V(begin_chunk)(V(chunk) *in, const V(real) *x, ptrdiff_t n, V(real) filler)
{
    ptrdiff_t left = n % V(GROUP);
    in->x = x;
    in->n = n;
    in->n_whole = n - left;
    in->filler = filler;
    in->last = in->end + V(GROUP) - left;
    if (n >= V(GROUP))
        V(copy_group)(in->end, x + n - V(GROUP));
    else
        memcpy(in->last, x, sizeof *x * (size_t)n);
    for (int j = 0; j < V(GROUP); j += V(LANES))
        V(store)(in->end + V(GROUP) + j, V(all)(filler));
}

/* A run of the chunk itself, in two if it goes past `cut` */
INLINE V(run_of_groups) *V(add_run)(V(run_of_groups) *run, const V(real) *x, ptrdiff_t at, ptrdiff_t end,
                                    ptrdiff_t cut)
{
    if (at < cut && cut < end) {
        *run++ = (V(run_of_groups)){x + at, at, cut - at};
        at = cut;
    }
    *run = (V(run_of_groups)){x + at, at, end - at};
    return run + (at < end);
}

/* The chunk's runs without the real at `at`, which is -1 for none; none goes past `cut`, where the chunk to
 * come ends */
static void V(split)(V(chunk) *in, ptrdiff_t at, ptrdiff_t cut)
{
    V(run_of_groups) *run = in->runs;
    ptrdiff_t hole = at & -(ptrdiff_t)V(GROUP);
    if (at >= in->n_whole)
        in->last[at - hole] = in->filler;
    if (at < 0 || at >= in->n_whole) {
        run = V(add_run)(run, in->x, 0, in->n_whole, cut);
    } else {
        run = V(add_run)(run, in->x, 0, hole, cut);
        run = V(add_run)(run, in->x, hole + V(GROUP), in->n_whole, cut);
        V(copy_group)(in->copy, in->x + hole);
        in->copy[at - hole] = in->filler;
        *run++ = (V(run_of_groups)){in->copy, hole, V(GROUP)};
    }
    if (in->n_whole < in->n)
        *run++ = (V(run_of_groups)){in->last, in->n_whole, V(GROUP)};
    in->n_runs = run - in->runs;
}

/* The largest of n reals, whole groups; with NaN among them, any: that poisons the row */
INLINE V(vector) V(highest)(const V(real) *x, ptrdiff_t n)
{
    V(vector) high[2] = {V(all)(-INFINITY), V(all)(-INFINITY)};
    for (ptrdiff_t c = 0; c < n; c += V(GROUP))
        for (int j = 0; j < 2; j++)
            high[j] = V(max)(high[j], V(load)(x + c + j * V(LANES)));
    return V(max)(high[0], high[1]);
}

/* The largest of a chunk to come, but for what follows its n reals in whole groups; sought while the chunk
 * before it is summed, so that memory and arithmetic work at the same time. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n;
    V(vector) highest;
} V(following);

/* The place of `value`, which is there unless the last group has it, among n reals, whole groups */
INLINE ptrdiff_t V(place_of)(const V(real) *x, ptrdiff_t n, V(real) value)
{
    enum { AT_ONCE = 8 }; /* vectors */
    ptrdiff_t c = 0;
    for (; c + AT_ONCE * V(LANES) <= n; c += AT_ONCE * V(LANES)) {
        V(mask) found = V(equal)(V(load)(x + c), V(all)(value));
        for (int j = 1; j < AT_ONCE; j++)
            found |= V(equal)(V(load)(x + c + j * V(LANES)), V(all)(value));
        if (V(any)(found))
            break;
    }
    for (; c < n; c += V(LANES)) {
        uint64_t found = V(lane_bits)(V(equal)(V(load)(x + c), V(all)(value)));
        if (found)
            return c + __builtin_ctzll(found);
    }
    return n;
}

/* What goes through a chain of additions, and through a chunk */
typedef struct {
    V(vector) sum[2], weight[2], gap[2];
} V(chain_sums);
typedef struct {
    V(vector) sum, weight, gap, high[2];
} V(chunk_sums);

enum { V(WRITES_NOTHING), V(WRITES_EXPS), V(WRITES_LOGS) };

/* What they are summed with, and the rows that are written meanwhile. The flags are constants to the
 * compiler: without gamma and exponentials to keep there is nothing of them in the loop. */
typedef struct {
    int has_gamma, keeps_exps, has_shift, writes; /* WRITES_... */
    V(exp_scale) scale;
    V(vector) shift, reference;
    const V(chunk) *x, *gamma;
    V(real) *exps;
    V(following) *next;
    V(writer) *writer;
    const V(real) *from, *end;
    V(real) *to;
} V(summing);

INLINE void V(sum_group)(const V(summing) *with, V(chain_sums) *total, const V(real) *x, const V(real) *gamma,
                         V(real) *exps)
{
    V(vector) p[2], power[2];
    for (int j = 0; j < 2; j++)
        p[j] = V(load)(x + j * V(LANES));
    for (int j = 0; j < 2 && with->has_gamma; j++) {
        V(vector) w = V(load)(gamma + j * V(LANES));
        total->weight[j] += w;
        total->gap[j] = V(fma)(w, V(keep)(V(nonzero)(w), with->reference - p[j]), total->gap[j]);
    }
    for (int j = 0; j < 2 && with->has_shift; j++)
        p[j] -= with->shift;
    V(exp_parts)(p, power, 2, with->scale, 0);
    for (int j = 0; j < 2; j++) {
        if (with->keeps_exps)
            V(store)(exps + j * V(LANES), p[j] * power[j]);
        total->sum[j] = V(fma)(p[j], power[j], total->sum[j]);
    }
}

INLINE void V(fold_chain)(V(chunk_sums) *sums, V(chain_sums) *chain)
{
    const V(vector) zero = V(all)(0);
    sums->sum += chain->sum[0] + chain->sum[1];
    sums->weight += chain->weight[0] + chain->weight[1];
    sums->gap += chain->gap[0] + chain->gap[1];
    *chain = (V(chain_sums)){{zero, zero}, {zero, zero}, {zero, zero}};
}

/* Add a run. */
INLINE void V(sum_run)(V(summing) *with, ptrdiff_t r, V(chunk_sums) *sums)
{
    const V(vector) zero = V(all)(0);
    const V(run_of_groups) *run = with->x->runs + r;
    const V(real) *x = run->from, *gamma = with->has_gamma ? with->gamma->runs[r].from : x;
    int is_ahead = run->at < with->next->n;
    const V(real) *ahead = is_ahead ? with->next->x + run->at : x;
    const V(vector) high[2] = {sums->high[0], sums->high[1]};
    V(real) *exps = with->keeps_exps ? with->exps + run->at : NULL;
    V(chain_sums) chain = {{zero, zero}, {zero, zero}, {zero, zero}};
    for (ptrdiff_t c = 0, n = run->n; c < n; c += V(GROUP)) {
        for (size_t line = 0; line < sizeof(V(real)) * V(GROUP); line += 64) {
            __builtin_prefetch((const char *)(ahead + c) + PREFETCH_BYTES + line);
            if (with->has_gamma)
                __builtin_prefetch((const char *)(gamma + c) + PREFETCH_BYTES + line);
            if (with->writes && with->from != with->end) {
                V(write_line)(&with->from, &with->to, &with->writer->entries, with->writes == V(WRITES_LOGS));
                if (with->from == with->end) {
                    V(next_run)(with->writer);
                    with->from = with->writer->from, with->end = with->writer->end;
                    with->to = with->writer->to;
                }
            }
        }
        for (int j = 0; j < 2; j++)
            sums->high[j] = V(max)(sums->high[j], V(load)(ahead + c + j * V(LANES)));
        V(sum_group)(with, &chain, x + c, gamma + c, with->keeps_exps ? exps + c : NULL);
        if (__builtin_expect(c % (V(CHAIN) *V(GROUP)) == 0, 0))
            V(fold_chain)(sums, &chain);
    }
    V(fold_chain)(sums, &chain);
    for (int j = 0; j < 2 && !is_ahead; j++)
        sums->high[j] = high[j];
}

/* Add a chunk to the row. */
INLINE void V(sum_chunk)(row_statistics *row, V(summing) with)
{
    const V(vector) zero = V(all)(0), low = V(all)(-INFINITY);
    V(chunk_sums) sums = {zero, zero, zero, {low, low}};
    with.scale = V(row_scale)(row);
    with.shift = V(all)((V(real))row->shift);
    with.reference = V(all)((V(real))row->largest);
    if (with.writes)
        with.from = with.writer->from, with.end = with.writer->end, with.to = with.writer->to;
    for (ptrdiff_t r = 0; r < with.x->n_runs; r++)
        V(sum_run)(&with, r, &sums);
    if (with.writes)
        with.writer->from = with.from, with.writer->to = with.to;
    ptrdiff_t seen = with.x->n_whole < with.next->n ? with.x->n_whole : with.next->n;
    with.next->highest =
        V(max)(V(max)(sums.high[0], sums.high[1]), V(highest)(with.next->x + seen, with.next->n - seen));
    add(&row->sum, V(lanes_sum)(sums.sum));
    if (with.has_gamma) {
        add(&row->weight, V(lanes_sum)(sums.weight));
        add(&row->gap, V(lanes_sum)(sums.gap));
    }
}

/* Functions of their own, so that each has the registers to itself */
#define SUM_CHUNK(name, has_gamma, keeps_exps, has_shift, writes)                                           \
    static __attribute__((noinline)) void V(name)(row_statistics * row, const V(chunk) *x,                  \
                                                  const V(chunk) *gamma, V(real) *exps, V(following) *next, \
                                                  V(writer) *writer)                                        \
    {                                                                                                       \
        V(sum_chunk)(row, (V(summing)){has_gamma, keeps_exps, has_shift, writes, .x = x, .gamma = gamma,    \
                                       .exps = exps, .next = next, .writer = writer});                      \
    }
SUM_CHUNK(sum_plain, 0, 0, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_kept, 0, 1, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_and_write, 0, 1, 0, V(WRITES_EXPS))
SUM_CHUNK(sum_and_write_logs, 0, 0, 0, V(WRITES_LOGS))
SUM_CHUNK(sum_weighted, 1, 0, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_anything, gamma != NULL, exps != NULL, 1, V(WRITES_NOTHING))
#undef SUM_CHUNK

/* Add a chunk of n classes; gamma and exps may be NULL. `seen` is what the chunk before it has seen of this
 * one, if it was that; then what this one sees of the next n_next classes, if there are any. */
static void V(add_chunk)(row_statistics *row, const V(real) *logits, const V(real) *gamma, ptrdiff_t n,
                         ptrdiff_t first_class, V(real) *exps, V(following) *seen, const V(real) *next,
                         ptrdiff_t n_next, V(writer) *writer)
{
    V(chunk) x, weights;
    ptrdiff_t at = -1;
    V(begin_chunk)(&x, logits, n, -INFINITY);
    if (gamma)
        V(begin_chunk)(&weights, gamma, n, 0);
    if (seen->x != logits || seen->n != x.n_whole)
        seen->highest = V(highest)(logits, x.n_whole);
    V(real) largest = V(lanes_max)(V(max)(seen->highest, V(highest)(x.last, V(GROUP))));
    if (largest > row->largest) {
        at = V(place_of)(logits, x.n_whole, largest);
        if (at == x.n_whole)
            at += V(place_of)(x.last, V(GROUP), largest);
        V(raise_largest)(row, largest, first_class + at, gamma ? gamma[at] : 0);
    }
    seen->x = next;
    seen->n = n_next - n_next % V(GROUP);
    V(split)(&x, at, seen->n);
    if (gamma)
        V(split)(&weights, at, seen->n);
    if (row->largest == INFINITY) {
        add(&row->sum, V(has_nan)(logits, n) ? NAN : 0);
        seen->x = NULL;
        seen->n = 0;
    } else if (row->shift != 0 || (gamma && exps)) {
        V(sum_anything)(row, &x, gamma ? &weights : NULL, exps, seen, NULL);
    } else if (gamma) {
        V(sum_weighted)(row, &x, &weights, NULL, seen, NULL);
    } else if (writer && writer->from != writer->end) {
        (exps ? V(sum_and_write) : V(sum_and_write_logs))(row, &x, NULL, exps, seen, writer);
    } else if (exps) {
        V(sum_kept)(row, &x, NULL, exps, seen, NULL);
    } else {
        V(sum_plain)(row, &x, NULL, NULL, seen, NULL);
    }
    if (exps && at >= 0) /* a larger one may come */
        exps[at] = V(exp_scaled)(V(all)(largest - (V(real))row->shift), V(row_scale)(row))[0];
}
#undef V
