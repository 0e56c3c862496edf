/* Rows whose classes lie next to each other, in one real type; included once for each.
 *
 * add_chunk reads some classes once, as many as the first cache holds with ease. Their largest is known by
 * then: it was sought while the chunk before was summed, so memory and arithmetic work at the same time. If
 * it is the row's, its predecessor joins the others. Then the chunk's exponentials are added to the sum in
 * one flat loop, since what stands around a loop takes its time too, and kept for the second pass where that
 * is asked for. The loop steps over the group that holds the largest; that one and what is left at the end
 * are loaded by lane (no copies: a load waits long for smaller stores just before it).
 */
#define V(name) PASTE(REAL, name)

enum {
    V(AT_ONCE) = VECTORS_AT_ONCE, /* as many as the registers hold with all they need */
    V(GROUP) = V(AT_ONCE) *V(LANES),
    V(GROUP_BYTES) = V(AT_ONCE) *VECTOR_BYTES,
    V(CHAIN) = 16 / V(AT_ONCE), /* groups: in each of two chains of additions eight */
    /* The largest exponential of a row is about 2^HEADROOM, so that those of classes whose probability is no
     * normal number still are. */
    V(HEADROOM) = sizeof(V(real)) == 8 ? 60 : 30
};

/* How far the sum's exponent may stay behind a larger logit's before it is raised; squares of exponentials,
 * too, are far from overflow. */
#define MARGIN 20

/* Lines asked for beyond those a loop fetches: while a row's largest is searched memory would rest. */
#define LINES_MEANWHILE 8

/* The scale of a row's exponentials, from its statistics */
INLINE V(exp_scale) V(row_scale)(const row_statistics *row)
{
    return V(exp_scale_of)(V(all)((V(real))row->exponent));
}

/* Make `largest` the row's; its predecessor joins the others. The exponent stays if it can. */
INLINE void V(raise_largest)(row_statistics *row, V(real) largest, ptrdiff_t top, double top_weight)
{
    row_statistics next;
    int is_first = row->largest == -INFINITY && row->sum.sum == 0; /* not NaN either */
    row_statistics *to = is_first ? row : &next;
    double shift = 0, exponent = 0;
    if (!is_first && row->shift == 0 && fabs(largest) <= DIRECT &&
        largest * LOG2_BASE - V(HEADROOM) <= row->exponent + MARGIN) {
        exponent = row->exponent;
    } else if (fabs(largest) <= DIRECT) {
        exponent = rint(largest * LOG2_BASE) - V(HEADROOM);
    } else if (largest < INFINITY) {
        shift = largest;
        exponent = -V(HEADROOM);
    }
    if (!is_first)
        begin(&next);
    to->largest = largest;
    to->shift = shift;
    to->exponent = exponent;
    to->top = top;
    to->top_weight = top_weight;
    if (!is_first)
        merge(row, &next, LOG2_BASE);
}

static int V(has_nan)(const V(real) *x, ptrdiff_t n)
{
    int found = 0;
    for (ptrdiff_t c = 0; c < n; c++)
        found |= isnan(x[c]);
    return found;
}

/* A group's vectors, of which n reals are to come; `filler` in place of what follows, and of the real at
 * `but` */
INLINE void V(load_some)(V(vector) *v, const V(real) *x, ptrdiff_t n, ptrdiff_t but, V(real) filler)
{
#ifdef VECTOR_AVX512
    uint64_t kept = n < V(GROUP) ? ((uint64_t)1 << n) - 1 : ~(uint64_t)0;
    kept &= but >= 0 && but < V(GROUP) ? ~((uint64_t)1 << but) : ~(uint64_t)0;
    for (int j = 0; j < V(AT_ONCE); j++)
        v[j] = V(load_kept)(x + j * V(LANES), (V(mask))(kept >> (j * V(LANES))), filler);
#else
    for (int j = 0; j < V(AT_ONCE); j++) {
        V(mask) out = V(equal)(V(numbers)(), V(all)((V(real))(but - j * V(LANES))));
        v[j] = V(choose)(out, V(all)(filler), V(load_first)(x + j * V(LANES), n - j * V(LANES), filler));
    }
#endif
}

/* The largest of `high` and n reals from number `from` on; with NaN among them, any: that poisons the row */
INLINE V(real) V(highest)(V(vector) high, const V(real) *x, ptrdiff_t from, ptrdiff_t n)
{
    ptrdiff_t c = from;
    for (; c + V(LANES) <= n; c += V(LANES))
        high = V(max)(high, V(load)(x + c));
    if (c < n)
        high = V(max)(high, V(load_first)(x + c, n - c, -INFINITY));
    return V(lanes_max)(high);
}

/* The largest of a chunk to come, sought while the chunk before it is summed, so that memory and arithmetic
 * work at the same time. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n;
    V(real) largest;
    distances rows; /* to what is fetched */
} V(following);

/* The place of `value`, which is there, among n reals */
INLINE ptrdiff_t V(place_of)(const V(real) *x, ptrdiff_t n, V(real) value)
{
    enum { AT_ONCE = 64 / V(LANES) }; /* vectors: a bit for each real */
    uint64_t bits = 0;
    ptrdiff_t c = 0;
    for (; c + 64 <= n; c += 64) {
        V(mask) found = V(equal)(V(load)(x + c), V(all)(value));
        for (int j = 1; j < AT_ONCE; j++)
            found |= V(equal)(V(load)(x + c + j * V(LANES)), V(all)(value));
        if (V(any)(found))
            break;
    }
    for (int j = 0; j < AT_ONCE; j++) {
        V(vector) some = V(load_first)(x + c + j * V(LANES), n - c - j * V(LANES), NAN);
        bits |= V(lane_bits)(V(equal)(some, V(all)(value))) << (j * V(LANES));
    }
    return c + __builtin_ctzll(bits);
}

/* What goes through a chain of additions, and through a chunk. Figures are summed where gamma would be. */
typedef struct {
    V(vector) sum[2], weight[2], gap[2];
} V(chain_sums);
typedef struct {
    V(vector) sum, weight, gap, high[2];
    V(counter) n_before;
} V(chunk_sums);

/* What a row's classes are ranked against: its label, counted from the chunk's first class, and the label's
 * logit; of a class before the label the next smaller number, as equals come before it, too. */
typedef struct {
    V(real) logit, below;
    ptrdiff_t label;
} V(ranking);

enum { V(WRITES_NOTHING), V(WRITES_EXPS), V(WRITES_LOGS) };

/* What they are summed with, and the rows that are written meanwhile. The flags are constants to the
 * compiler: without gamma and exponentials to keep there is nothing of them in the loop. */
typedef struct {
    int has_gamma, keeps_exps, has_shift, writes, has_figures, ranks; /* WRITES_... */
    const V(real) *x, *gamma;
    ptrdiff_t n, top; /* `top` is left out; -1 for none */
    V(real) *exps;
    V(following) *next;
    V(writer) *writer;
    V(exp_scale) scale;
    V(vector) shift, reference;
    const V(real) *from, *end;
    V(real) *to;
    const V(ranking) *ranking;
} V(summing);

/* Add a group: p its logits, w their gamma. */
INLINE void V(sum_group)(const V(summing) *with, V(chain_sums) *total, V(vector) *p, const V(vector) *w,
                         V(real) *exps)
{
    V(vector) power[V(AT_ONCE)], gap[V(AT_ONCE)];
    for (int j = 0; with->has_gamma && j < V(AT_ONCE); j++) {
        total->weight[j % 2] += w[j];
        total->gap[j % 2] =
            V(fma)(w[j], V(keep)(V(nonzero)(w[j]), with->reference - p[j]), total->gap[j % 2]);
    }
    for (int j = 0; with->has_shift && j < V(AT_ONCE); j++)
        p[j] -= with->shift;
    for (int j = 0; j < V(AT_ONCE); j++)
        p[j] = V(max)(with->scale.floor, p[j]);
    for (int j = 0; with->has_figures && j < V(AT_ONCE); j++)
        gap[j] = with->reference - p[j]; /* finite where the exponential is 0 */
    V(exp_parts)(p, power, V(AT_ONCE), with->scale);
    for (int j = 0; j < V(AT_ONCE); j++) {
        if (with->has_figures) {
            V(vector) e = p[j] * power[j];
            total->sum[j % (V(AT_ONCE) / 2)] += e; /* registers are few */
            total->weight[0] = V(fma)(e, e, total->weight[0]);
            total->gap[0] = V(fma)(e, gap[j], total->gap[0]);
            continue;
        }
        if (with->keeps_exps)
            V(store)(exps + j * V(LANES), p[j] * power[j]);
        total->sum[j % 2] = V(fma)(p[j], power[j], total->sum[j % 2]);
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

INLINE void V(write_lines)(V(summing) *with, int n)
{
    for (int line = 0; line < n && with->from != with->end; line++) {
        V(write_line)(&with->from, &with->to, &with->writer->entries, with->writes == V(WRITES_LOGS));
        if (with->from == with->end) {
            V(next_run)(with->writer);
            with->from = with->writer->from, with->end = with->writer->end;
            with->to = with->writer->to;
        }
    }
}

/* What a class that comes before the label's is above: of those in groups before its own, and of the rest */
INLINE V(vector) V(rank_bound)(const V(summing) *with, int is_before)
{
    return with->ranks ? V(all)(is_before ? with->ranking->below : with->ranking->logit) : V(all)(0);
}

INLINE void V(rank_group)(V(counter) *n_before, const V(vector) *p, V(vector) bound)
{
    V(mask) above[V(AT_ONCE)];
    for (int j = 0; j < V(AT_ONCE); j++)
        above[j] = V(greater)(p[j], bound);
    *n_before = V(count)(*n_before, above, V(AT_ONCE));
}

/* In the label's own group, those of its logit that stand before it */
INLINE void V(rank_equals)(const V(summing) *with, V(counter) *n_before)
{
    ptrdiff_t first = with->ranking->label & -(ptrdiff_t)V(GROUP);
    V(vector) p[V(AT_ONCE)];
    if (with->ranking->label < 0 || with->ranking->label >= with->n)
        return;
    V(load_some)(p, with->x + first, with->ranking->label - first, with->top - first, NAN);
    V(mask) equal[V(AT_ONCE)];
    for (int j = 0; j < V(AT_ONCE); j++)
        equal[j] = V(equal)(p[j], V(all)(with->ranking->logit));
    *n_before = V(count)(*n_before, equal, V(AT_ONCE));
}

/* Add the reals from `from` to `to` of whole groups, but for the group of the top, at `hole`; see as many of
 * `ahead`. */
INLINE void V(sum_run)(V(summing) *with, V(chunk_sums) *sums, V(chain_sums) *chain, ptrdiff_t from,
                       ptrdiff_t to, ptrdiff_t hole, const V(real) *ahead, V(vector) bound)
{
    const V(real) *x = with->x, *gamma = with->gamma;
    const distances of_rows = with->next->rows, of_gamma = in_order;
    for (ptrdiff_t c = from; c < to; c += V(GROUP)) {
        ptrdiff_t at = c < hole ? c : c + V(GROUP);
        const V(real) *look = ahead + c;
        V(vector) p[V(AT_ONCE)], w[V(AT_ONCE)];
        fetch_ahead(look, V(GROUP_BYTES), of_rows);
        if (with->has_gamma)
            fetch_ahead(gamma + c, V(GROUP_BYTES), of_gamma);
        if (with->writes)
            V(write_lines)(with, (V(GROUP_BYTES) + 63) / 64);
        for (int j = 0; j < V(AT_ONCE); j++) {
            int k = with->has_figures ? j % (V(AT_ONCE) / 2) : j % 2; /* registers are few */
            sums->high[k] = V(max)(sums->high[k], V(load)(look + j * V(LANES)));
            p[j] = V(load)(x + at + j * V(LANES));
            if (with->has_gamma)
                w[j] = V(load)(gamma + at + j * V(LANES));
        }
        if (with->ranks)
            V(rank_group)(&sums->n_before, p, bound);
        V(sum_group)(with, chain, p, w, with->keeps_exps ? with->exps + at : NULL);
        if (__builtin_expect(c / V(GROUP) % V(CHAIN) == V(CHAIN) - 1, 0))
            V(fold_chain)(sums, chain);
    }
}

/* Add the first n reals: those before the label's group have a bound of their own. */
INLINE void V(sum_whole)(V(summing) *with, V(chunk_sums) *sums, ptrdiff_t n, ptrdiff_t hole,
                         const V(real) *ahead)
{
    const V(vector) zero = V(all)(0);
    V(chain_sums) chain = {{zero, zero}, {zero, zero}, {zero, zero}};
    ptrdiff_t before = 0;
    if (with->ranks) {
        before = with->ranking->label & -(ptrdiff_t)V(GROUP);
        before -= before > hole ? V(GROUP) : 0;
        before = before < 0 ? 0 : (before < n ? before : n);
        V(sum_run)(with, sums, &chain, 0, before, hole, ahead, V(rank_bound)(with, 1));
    }
    V(sum_run)(with, sums, &chain, before, n, hole, ahead, V(rank_bound)(with, 0));
    V(fold_chain)(sums, &chain);
}

/* Add a chunk to the row. */
INLINE void V(sum_chunk)(row_statistics *row, V(summing) with)
{
    const V(vector) zero = V(all)(0), low = V(all)(-INFINITY);
    V(chunk_sums) sums = {zero, zero, zero, {low, low}, V(no_count)()};
    V(chain_sums) chain = {{zero, zero}, {zero, zero}, {zero, zero}};
    V(following) *next = with.next;
    ptrdiff_t whole = with.n & -(ptrdiff_t)V(GROUP);
    ptrdiff_t hole = with.top < 0 ? whole : with.top & -(ptrdiff_t)V(GROUP);
    with.scale = V(row_scale)(row);
    with.shift = V(all)((V(real))row->shift);
    with.reference = V(all)((V(real))(finite_or_0(row->largest) - (with.has_figures ? row->shift : 0)));
    if (with.writes)
        with.from = with.writer->from, with.end = with.writer->end, with.to = with.writer->to;
    /* A shorter chunk to come is seen afterwards: the loop need not ask where it ends. */
    ptrdiff_t n = whole - (hole < whole ? V(GROUP) : 0), seen = n <= next->n ? n : 0;
    V(sum_whole)(&with, &sums, n, hole, seen == n ? next->x : with.x);
    if (with.writes)
        with.writer->from = with.from, with.writer->to = with.to;
    fetch_ahead(next->x + seen, (next->n - seen) * (ptrdiff_t)sizeof(V(real)), next->rows);
    next->largest = V(highest)(seen ? V(max)(sums.high[0], sums.high[1]) : low, next->x, seen, next->n);
    /* The groups of the top and at the end: last, so that they are summed while the largest is on its way */
    ptrdiff_t rest = hole;
    for (int k = 0; k < 2; k++, rest = whole) {
        if (rest == with.n || (k && rest == hole))
            break;
        V(vector) p[V(AT_ONCE)], w[V(AT_ONCE)];
        V(load_some)(p, with.x + rest, with.n - rest, with.top - rest, -INFINITY);
        if (with.has_gamma)
            V(load_some)(w, with.gamma + rest, with.n - rest, with.top - rest, 0);
        if (with.ranks)
            V(rank_group)(&sums.n_before, p, V(rank_bound)(&with, rest + V(GROUP) <= with.ranking->label));
        V(sum_group)(&with, &chain, p, w, with.keeps_exps ? with.exps + rest : NULL);
    }
    V(fold_chain)(&sums, &chain);
    add(&row->sum, V(lanes_sum)(sums.sum));
    if (with.has_gamma) {
        add(&row->weight, V(lanes_sum)(sums.weight));
        add(&row->gap, V(lanes_sum)(sums.gap));
    }
    if (with.ranks)
        V(rank_equals)(&with, &sums.n_before);
    if (with.has_figures) {
        add(&row->square, V(lanes_sum)(sums.weight));
        add(&row->spread, V(lanes_sum)(sums.gap));
        row->n_before += V(counted)(sums.n_before);
    }
}

/* Functions of their own, so that each has the registers to itself */
#define SUM_CHUNK(name, has_gamma, keeps_exps, has_shift, writes)                                          \
    static __attribute__((noinline)) void V(name)(row_statistics * row, const V(real) *x,                  \
                                                  const V(real) *gamma, ptrdiff_t n, ptrdiff_t top,        \
                                                  V(real) *exps, V(following) *next, V(writer) *writer)    \
    {                                                                                                      \
        V(sum_chunk)(row, (V(summing)){has_gamma, keeps_exps, has_shift, writes, .x = x, .gamma = gamma,   \
                                       .n = n, .top = top, .exps = exps, .next = next, .writer = writer}); \
    }
SUM_CHUNK(sum_plain, 0, 0, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_kept, 0, 1, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_and_write, 0, 1, 0, V(WRITES_EXPS))
SUM_CHUNK(sum_and_write_logs, 0, 0, 0, V(WRITES_LOGS))
SUM_CHUNK(sum_weighted, 1, 0, 0, V(WRITES_NOTHING))
SUM_CHUNK(sum_anything, gamma != NULL, exps != NULL, 1, V(WRITES_NOTHING))
#undef SUM_CHUNK
#define SUM_FIGURES(name, shifts, counts)                                                                    \
    static                                                                                                   \
        __attribute__((noinline)) void V(name)(row_statistics * row, const V(real) *x, ptrdiff_t n,          \
                                               ptrdiff_t top, V(following) *next, const V(ranking) *ranking) \
    {                                                                                                        \
        V(sum_chunk)(row, (V(summing)){.has_shift = shifts,                                                  \
                                       .has_figures = 1,                                                     \
                                       .ranks = counts,                                                      \
                                       .x = x,                                                               \
                                       .n = n,                                                               \
                                       .top = top,                                                           \
                                       .next = next,                                                         \
                                       .ranking = ranking});                                                 \
    }
SUM_FIGURES(sum_figures, 0, 1)
SUM_FIGURES(sum_figures_behind, 0, 0)
SUM_FIGURES(sum_any_figures, 1, 1)
#undef SUM_FIGURES

/* Add a chunk of n classes; gamma and exps may be NULL. `seen` is what the chunk before it has seen of this
 * one, if it was that; then what this one sees of the next n_next classes, if there are any. `ranking` is
 * NULL where no figures are wanted; they are wanted without gamma and exps. */
static void V(add_chunk)(row_statistics *row, const V(real) *logits, const V(real) *gamma, ptrdiff_t n,
                         ptrdiff_t first_class, V(real) *exps, V(following) *seen, const V(real) *next,
                         ptrdiff_t n_next, V(writer) *writer, V(ranking) *ranking)
{
    ptrdiff_t at = -1;
    if (seen->x != logits || seen->n != n)
        seen->largest = V(highest)(V(all)(-INFINITY), logits, 0, n);
    V(real) largest = seen->largest;
    if (largest > row->largest) {
        const char *behind = (const char *)next + farther(seen->rows);
        for (int line = 0; n_next > 0 && line < LINES_MEANWHILE; line++)
            __builtin_prefetch(behind + 64 * line, 0, 2);
        at = V(place_of)(logits, n, largest);
        V(raise_largest)(row, largest, first_class + at, gamma ? gamma[at] : 0);
    }
    seen->x = next;
    seen->n = n_next;
    if (ranking && at >= 0) /* the top is not among those that are summed */
        row->n_before += largest > ranking->logit || (largest == ranking->logit && at < ranking->label);
    if (row->largest == INFINITY) {
        add(&row->sum, V(has_nan)(logits, n) ? NAN : 0);
        seen->x = NULL;
    } else if (ranking) {
        /* No class comes before the label's where it is the largest itself, or larger: mostly so. */
        int is_behind = largest < ranking->logit || (at >= 0 && at == ranking->label);
        (row->shift != 0 ? V(sum_any_figures)
         : is_behind     ? V(sum_figures_behind)
                         : V(sum_figures))(row, logits, n, at, seen, ranking);
    } else if (row->shift != 0 || (gamma && exps)) {
        V(sum_anything)(row, logits, gamma, n, at, exps, seen, NULL);
    } else if (gamma) {
        V(sum_weighted)(row, logits, gamma, n, at, NULL, seen, NULL);
    } else if (writer && writer->from != writer->end) {
        (exps ? V(sum_and_write) : V(sum_and_write_logs))(row, logits, NULL, n, at, exps, seen, writer);
    } else if (exps) {
        V(sum_kept)(row, logits, NULL, n, at, exps, seen, NULL);
    } else {
        V(sum_plain)(row, logits, NULL, n, at, NULL, seen, NULL);
    }
    if (exps && at >= 0) /* a larger one may come */
        exps[at] = V(exp_scaled)(V(all)(largest - (V(real))row->shift), V(row_scale)(row))[0];
}
#undef V
