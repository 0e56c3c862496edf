/* Rows whose classes lie next to each other, in one real type; included once for each.
 *
 * add_chunk reads some classes once, as many as the first cache holds with ease. Their largest is known by
 * then: it was sought while the chunk before was summed, so memory and arithmetic work at the same time. If
 * it is the row's, its predecessor joins the others. Then the chunk's exponentials are added to the sum,
 * without a branch, span by span, and kept for the second pass where that is asked for. The span that holds
 * the largest is summed from a copy without it.
 */
#define V(name) PASTE(REAL, name)

enum {
    V(GROUP) = 2 * V(LANES),
    V(IN_SPAN) = 8, /* groups: what one chain of additions adds up */
    V(SPAN) = V(IN_SPAN) *V(GROUP),
    V(SPANS) = (V(CHUNK) + V(SPAN) - 1) / V(SPAN),
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
    if (row->largest > -INFINITY && row->shift == 0 && fabs(largest) <= DIRECT &&
        largest * LOG2_BASE - V(HEADROOM) <= row->exponent + MARGIN) {
        next.exponent = row->exponent;
    } else if (fabs(largest) <= DIRECT) {
        next.exponent = rint(largest * LOG2_BASE) - V(HEADROOM);
    } else if (largest < INFINITY) {
        next.shift = largest;
        next.exponent = -V(HEADROOM);
    }
    if (row->largest == -INFINITY && row->sum.sum == 0) /* not NaN either */
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

/* A chunk as spans of at most eight groups, and if it ends within a group, one more of that last group: it
 * ends with the chunk, and `filler` stands for what the group before it holds. The row's largest is left out:
 * its span is a copy with `filler` in its place. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n, n_groups, n_spans, copied; /* whole groups; all spans; the span that is a copy, or n_spans */
    V(real) filler;
    V(real) ALIGNED last_group[V(GROUP)], copy[V(SPAN)];
} V(chunk);

INLINE ptrdiff_t V(spans_of)(ptrdiff_t n_groups) { return (n_groups + V(IN_SPAN) - 1) / V(IN_SPAN); }

INLINE const V(real) *V(original)(const V(chunk) *in, ptrdiff_t s)
{
    return s * V(IN_SPAN) < in->n_groups ? in->x + s * V(SPAN) : in->last_group;
}

INLINE const V(real) *V(span)(const V(chunk) *in, ptrdiff_t s)
{
    return s == in->copied ? in->copy : V(original)(in, s);
}

/* Of whole groups those in span s; none or less in what follows them */
INLINE ptrdiff_t V(groups_in)(ptrdiff_t n_groups, ptrdiff_t s)
{
    ptrdiff_t left = n_groups - s * V(IN_SPAN);
    return left < V(IN_SPAN) ? left : V(IN_SPAN);
}

/* Where span s starts in the chunk */
INLINE ptrdiff_t V(start_of)(const V(chunk) *in, ptrdiff_t s)
{
    if (s * V(IN_SPAN) < in->n_groups)
        return s * V(SPAN);
    return in->n_groups ? in->n - V(GROUP) : 0;
}

/* A copy of n reals but for those numbered from ... to - 1 */
INLINE void V(copy_without)(V(real) *copy, const V(real) *x, ptrdiff_t n, ptrdiff_t from, ptrdiff_t to,
                            V(real) filler)
{
    V(vector) low = V(all)((V(real))from), high = V(all)((V(real))to), number = V(numbers)();
    for (ptrdiff_t c = 0; c < n; c += V(LANES), number += V(LANES)) {
        V(mask) out = V(not_below)(number, low) & V(greater)(high, number);
        V(store)(copy + c, V(choose)(out, V(all)(filler), V(load)(x + c)));
    }
}

static void V(split)(V(chunk) *in, const V(real) *x, ptrdiff_t n, V(real) filler)
{
    ptrdiff_t left = n % V(GROUP);
    in->x = x;
    in->n = n;
    in->filler = filler;
    in->n_groups = n / V(GROUP);
    in->n_spans = in->copied = V(spans_of)(in->n_groups) + (left != 0);
    if (in->n_groups)
        V(copy_without)(in->last_group, x + n - V(GROUP), V(GROUP), 0, V(GROUP) - left, filler);
    for (int j = 0; j < V(GROUP) &&!in->n_groups; j++)
        in->last_group[j] = j < left ? x[j] : filler;
}

/* Leave out the real at `place` of span s. */
INLINE void V(leave_out)(V(chunk) *in, ptrdiff_t s, ptrdiff_t place)
{
    ptrdiff_t n_groups = V(groups_in)(in->n_groups, s);
    V(copy_without)(in->copy, V(original)(in, s), V(GROUP) *(n_groups > 0 ? n_groups : 1), place, place + 1,
                    in->filler);
    in->copied = s;
}

/* The largest of some groups; with NaN among them, any: that poisons the row */
INLINE V(vector) V(highest)(const V(real) *x, ptrdiff_t n_groups)
{
    V(vector) high[2] = {V(all)(-INFINITY), V(all)(-INFINITY)};
    for (; n_groups > 0; n_groups--, x += V(GROUP))
        for (int j = 0; j < 2; j++)
            high[j] = V(max)(high[j], V(load)(x + j * V(LANES)));
    return V(max)(high[0], high[1]);
}

/* The largest of each span of a chunk to come, once the chunk before it is summed: so memory and arithmetic
 * work at the same time. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n_groups;
    V(vector) highest[V(SPANS)];
} V(following);

/* The place of `value`, which is there, among groups: without a branch on where */
INLINE ptrdiff_t V(place_of)(const V(real) *x, ptrdiff_t n_groups, V(real) value)
{
    enum { AT_ONCE = 64 / V(GROUP) }; /* groups: a bit for each real */
    ptrdiff_t at = 0;
    for (ptrdiff_t g = n_groups > 0 ? (n_groups - 1) / AT_ONCE * AT_ONCE : 0; g >= 0; g -= AT_ONCE) {
        uint64_t found = 0;
        for (ptrdiff_t k = 0; k < AT_ONCE && (g + k < n_groups || g + k == 0); k++)
            for (int j = 0; j < 2; j++)
                found |= V(lane_bits)(V(equal)(V(load)(x + (g + k) * V(GROUP) + j * V(LANES)), V(all)(value)))
                         << (k * V(GROUP) + j * V(LANES));
        at = found ? g * V(GROUP) + __builtin_ctzll(found) : at;
    }
    return at;
}

/* What goes through a span, and through a chunk */
typedef struct {
    V(vector) sum[2], weight[2], gap[2], high[2];
} V(span_sums);
typedef struct {
    V(vector) sum, weight, gap;
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

INLINE void V(sum_group)(const V(summing) *with, V(span_sums) *total, const V(real) *x, const V(real) *gamma,
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

/* Add span s. */
INLINE void V(sum_span)(V(summing) *with, ptrdiff_t s, V(chunk_sums) *sums)
{
    const V(vector) zero = V(all)(0), low = V(all)(-INFINITY);
    const V(real) *x = V(span)(with->x, s), *gamma = with->has_gamma ? V(span)(with->gamma, s) : x,
                  *ahead = x;
    V(real) *exps = with->keeps_exps ? with->exps + V(start_of)(with->x, s) : NULL;
    ptrdiff_t n_groups = V(groups_in)(with->x->n_groups, s);
    V(span_sums) total = {{zero, zero}, {zero, zero}, {zero, zero}, {low, low}};
    if (n_groups > 0 && V(groups_in)(with->next->n_groups, s) == n_groups)
        ahead = with->next->x + s * V(SPAN);
    n_groups = n_groups > 0 ? n_groups : 1;
    for (ptrdiff_t c = 0; c < n_groups * V(GROUP); c += V(GROUP)) {
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
            total.high[j] = V(max)(total.high[j], V(load)(ahead + c + j * V(LANES)));
        V(sum_group)(with, &total, x + c, gamma + c, with->keeps_exps ? exps + c : NULL);
    }
    sums->sum += total.sum[0] + total.sum[1];
    sums->weight += total.weight[0] + total.weight[1];
    sums->gap += total.gap[0] + total.gap[1];
    if (ahead != x)
        with->next->highest[s] = V(max)(total.high[0], total.high[1]);
}

/* Add a chunk to the row. */
INLINE void V(sum_chunk)(row_statistics *row, V(summing) with)
{
    const V(vector) zero = V(all)(0);
    V(chunk_sums) sums = {zero, zero, zero};
    const V(chunk) *x = with.x;
    V(following) *next = with.next;
    with.scale = V(row_scale)(row);
    with.shift = V(all)((V(real))row->shift);
    with.reference = V(all)((V(real))row->largest);
    if (with.writes)
        with.from = with.writer->from, with.end = with.writer->end, with.to = with.writer->to;
    /* The last first: exponentials it keeps of the group before it are written over. */
    for (ptrdiff_t i = 0; i < x->n_spans; i++)
        V(sum_span)(&with, i ? i - 1 : x->n_spans - 1, &sums);
    if (with.writes)
        with.writer->from = with.from, with.writer->to = with.to;
    for (ptrdiff_t s = 0; s < V(spans_of)(next->n_groups); s++)
        if (V(groups_in)(next->n_groups, s) != V(groups_in)(x->n_groups, s))
            next->highest[s] = V(highest)(next->x + s * V(SPAN), V(groups_in)(next->n_groups, s));
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
    V(split)(&x, logits, n, -INFINITY);
    ptrdiff_t n_whole = V(spans_of)(x.n_groups), at = -1;
    if (seen->x != logits || seen->n_groups != x.n_groups)
        for (ptrdiff_t s = 0; s < n_whole; s++)
            seen->highest[s] = V(highest)(logits + s * V(SPAN), V(groups_in)(x.n_groups, s));
    V(vector) highest = n_whole < x.n_spans ? V(highest)(x.last_group, 1) : V(all)(-INFINITY);
    for (ptrdiff_t s = 0; s < n_whole; s++)
        highest = V(max)(highest, seen->highest[s]);
    V(real) largest = V(lanes_max)(highest);
    if (gamma)
        V(split)(&weights, gamma, n, 0);
    if (largest > row->largest) {
        uint64_t found = (uint64_t)1 << n_whole; /* if in none of these, then in the last group */
        for (ptrdiff_t s = 0; s < n_whole; s++)
            found |= (uint64_t)V(any)(V(equal)(seen->highest[s], V(all)(largest))) << s;
        ptrdiff_t s = __builtin_ctzll(found),
                  place = V(place_of)(V(span)(&x, s), V(groups_in)(x.n_groups, s), largest);
        at = V(start_of)(&x, s) + place;
        V(leave_out)(&x, s, place);
        if (gamma)
            V(leave_out)(&weights, s, place);
        V(raise_largest)(row, largest, first_class + at, gamma ? gamma[at] : 0);
    }
    seen->x = n_next >= V(GROUP) ? next : NULL;
    seen->n_groups = n_next / V(GROUP);
    if (row->largest == INFINITY) {
        add(&row->sum, V(has_nan)(logits, n) ? NAN : 0);
        seen->x = NULL;
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
