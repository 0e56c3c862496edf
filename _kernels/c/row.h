/* Rows whose classes lie next to each other, in one real type; included once for each.
 *
 * add_chunk reads some classes once, as many as the first cache holds with ease. Their largest is known by
 * then: it was sought while the chunk before was summed, so memory and arithmetic work at the same time. If
 * it is the row's, its predecessor joins the others. Then the chunk's exponentials are added to the sum,
 * without a branch, and kept for the second pass where that is asked for. The group of vectors that holds the
 * largest is summed from a copy without it. row_map writes a result for each class.
 */
#define V(name) PASTE(REAL, name)

enum {
    V(GROUP) = 2 * V(LANES),
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

/* Whole groups of a chunk, but for two: the last, filled up with -inf, and the one with the row's largest,
 * where -inf stands in its place. Of gamma likewise, with 0. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n, last, top; /* the two's numbers, or -1 */
    V(real) ALIGNED last_group[V(GROUP)], top_group[V(GROUP)];
} V(groups);

INLINE const V(real) *V(group)(const V(groups) *in, ptrdiff_t g)
{
    const V(real) *x = in->x + g * V(GROUP);
    x = g == in->top ? in->top_group : x;
    return g == in->last ? in->last_group : x;
}

/* Where a group starts. The last one ends with the run, and leaves out what the group before it holds. */
INLINE ptrdiff_t V(first_of)(const V(groups) *in, ptrdiff_t g)
{
    return g > 0 && g == in->last ? in->n - V(GROUP) : g * V(GROUP);
}

/* A copy of GROUP reals but for those numbered from ... to - 1, which become `filler` */
INLINE void V(copy_without)(V(real) *copy, const V(real) *x, ptrdiff_t from, ptrdiff_t to, V(real) filler)
{
    V(vector) low = V(all)((V(real))from), high = V(all)((V(real))to), number = V(numbers)();
    for (int j = 0; j < V(GROUP); j += V(LANES), number += V(LANES)) {
        V(mask) out = V(not_below)(number, low) & V(greater)(high, number);
        V(store)(copy + j, V(choose)(out, V(all)(filler), V(load)(x + j)));
    }
}

static ptrdiff_t V(split)(V(groups) *in, const V(real) *x, ptrdiff_t n, V(real) filler)
{
    ptrdiff_t n_groups = n / V(GROUP), left = n % V(GROUP);
    in->x = x;
    in->n = n;
    in->top = in->last = -1;
    if (left && n_groups) {
        V(copy_without)(in->last_group, x + n - V(GROUP), 0, V(GROUP) - left, filler);
        in->last = n_groups++;
    } else if (left) {
        for (int j = 0; j < V(GROUP); j++)
            in->last_group[j] = j < left ? x[j] : filler;
        in->last = n_groups++;
    }
    return n_groups;
}

static void V(without)(V(groups) *in, ptrdiff_t at, V(real) filler)
{
    ptrdiff_t g = at / V(GROUP), place = at - V(first_of)(in, g);
    if (g == in->last) {
        V(copy_without)(in->last_group, in->last_group, place, place + 1, filler);
        return;
    }
    V(copy_without)(in->top_group, in->x + g * V(GROUP), place, place + 1, filler);
    in->top = g;
}

/* The largest of n_groups, or of what was seen before and them; NaN counts for nothing */
INLINE V(vector) V(highest)(const V(real) *x, ptrdiff_t n_groups, V(vector) before)
{
    V(vector) high[4] = {before, before, before, before};
    for (; n_groups >= 2; n_groups -= 2, x += 2 * V(GROUP))
        for (int j = 0; j < 4; j++)
            high[j] = V(max)(V(load)(x + j * V(LANES)), high[j]);
    for (int j = 0; j < 2 && n_groups; j++)
        high[j] = V(max)(V(load)(x + j * V(LANES)), high[j]);
    return V(max)(V(max)(high[0], high[1]), V(max)(high[2], high[3]));
}

/* The whole groups of the chunk that follows, and once the chunk before it is summed, their largest: so
 * memory and arithmetic work at the same time. */
typedef struct {
    const V(real) *x;
    ptrdiff_t n_groups;
    V(vector) highest;
} V(following);

/* Where `value`, which is there, first stands */
INLINE ptrdiff_t V(find)(const V(groups) *in, V(real) value)
{
    const V(real) *x = in->x, *end = x + in->n / (4 * V(GROUP))*(4 * V(GROUP));
    for (; x < end; x += 4 * V(GROUP)) {
        V(mask) found[8];
        for (int j = 0; j < 8; j++)
            found[j] = V(equal)(V(load)(x + j * V(LANES)), V(all)(value));
        if (V(any)(((found[0] | found[1]) | (found[2] | found[3])) |
                   ((found[4] | found[5]) | (found[6] | found[7]))))
            break;
    }
    while (x + V(LANES) <= in->x + in->n && !V(any)(V(equal)(V(load)(x), V(all)(value))))
        x += V(LANES);
    while (*x != value)
        x++;
    return x - in->x;
}

/* Add the groups of a chunk to the row; their exponentials go to `exps` if it is not NULL. */
INLINE void V(add_groups)(row_statistics *row, const V(groups) *x, const V(groups) *gamma, ptrdiff_t n_groups,
                          V(real) *exps, int has_shift, V(following) *next, V(writer) *writer)
{
    V(exp_scale) scale = V(row_scale)(row);
    V(vector) shift = V(all)((V(real))row->shift), reference = V(all)((V(real))row->largest),
              zero = V(all)(0);
    V(chained_sum) sum = {zero, zero}, weight = sum, gap = sum;
    V(vector) low = V(all)(-INFINITY), high[2] = {low, low};
    const V(real) *ahead = next->x, *last = ahead + (next->n_groups - 1) * V(GROUP);
    const V(real) *from = writer ? writer->from : NULL, *end = writer ? writer->end : NULL;
    V(real) *to = writer ? writer->to : NULL;
    /* Backwards, so that what the last group keeps of the group before it is written over */
    for (ptrdiff_t g = n_groups - 1; g >= 0; g--) {
        const V(real) *logits = V(group)(x, g), *weights = gamma ? V(group)(gamma, g) : NULL;
        V(vector) e[2], w[2], d[2];
        for (size_t line = 0; line < sizeof(V(real)) * V(GROUP); line += 64)
            __builtin_prefetch((const char *)ahead + PREFETCH_BYTES + line);
        for (int j = 0; j < 2; j++)
            high[j] = V(max)(V(load)(ahead + j * V(LANES)), high[j]);
        ahead = ahead < last ? ahead + V(GROUP) : last;
        for (size_t line = 0; writer && line < sizeof(V(real)) * V(GROUP) &&from != end; line += 64) {
            V(write_line)(&from, &to, writer->factor);
            if (from == end) {
                V(next_run)(writer);
                from = writer->from, end = writer->end, to = writer->to;
            }
        }
        for (int j = 0; j < 2; j++) {
            V(vector) logit = V(load)(logits + j * V(LANES));
            e[j] = V(exp_scaled)(has_shift ? logit - shift : logit, scale);
            if (exps)
                V(store)(exps + V(first_of)(x, g) + j * V(LANES), e[j]);
            if (gamma) {
                w[j] = V(load)(weights + j * V(LANES));
                d[j] = V(keep)(V(nonzero)(w[j]), w[j] * (reference - logit));
            }
        }
        V(chain)(&sum, e[0] + e[1], g);
        if (gamma) {
            V(chain)(&weight, w[0] + w[1], g);
            V(chain)(&gap, d[0] + d[1], g);
        }
    }
    if (writer)
        writer->from = from, writer->to = to;
    next->highest = V(highest)(ahead, (last - ahead) / V(GROUP) + 1, V(max)(high[0], high[1]));
    add(&row->sum, V(lanes_sum)(sum.sum + sum.chain));
    if (gamma) {
        add(&row->weight, V(lanes_sum)(weight.sum + weight.chain));
        add(&row->gap, V(lanes_sum)(gap.sum + gap.chain));
    }
}

/* Functions of their own, so that each has the registers to itself */
#define ADD_GROUPS(name, gamma, exps, has_shift, writes)                                                \
    static __attribute__((noinline)) void V(name)(row_statistics * row, const V(groups) *x,             \
                                                  const V(groups) *weights, ptrdiff_t n_groups,         \
                                                  V(real) *kept, V(following) *next, V(writer) *writer) \
    {                                                                                                   \
        (void)weights, (void)kept, (void)writer;                                                        \
        V(add_groups)(row, x, gamma, n_groups, exps, has_shift, next, writes);                          \
    }
ADD_GROUPS(add_plain, NULL, NULL, 0, NULL)
ADD_GROUPS(add_kept, NULL, kept, 0, NULL)
ADD_GROUPS(add_and_write, NULL, kept, 0, writer)
ADD_GROUPS(add_weighted, weights, kept, 1, NULL)
ADD_GROUPS(add_shifted, NULL, kept, 1, NULL)
#undef ADD_GROUPS

/* Add a chunk of n classes; gamma and exps may be NULL. `seen` is what the chunk before it has seen of this
 * one, if it was that; then what this one sees of the next n_next classes, if there are any. */
static void V(add_chunk)(row_statistics *row, const V(real) *logits, const V(real) *gamma, ptrdiff_t n,
                         ptrdiff_t first_class, V(real) *exps, V(following) *seen, const V(real) *next,
                         ptrdiff_t n_next, V(writer) *writer)
{
    V(groups) x, weights;
    ptrdiff_t n_whole = n / V(GROUP), n_groups = V(split)(&x, logits, n, -INFINITY), at = -1;
    V(vector) highest = V(all)(-INFINITY);
    if (seen->x == logits && seen->n_groups == n_whole)
        highest = seen->highest;
    else
        highest = V(highest)(logits, n_whole, highest);
    if (x.last >= 0)
        highest = V(highest)(x.last_group, 1, highest);
    V(real) largest = V(lanes_max)(highest);
    *seen = (V(following)){n_next >= V(GROUP) ? next
                           : x.n >= V(GROUP)  ? logits
                                              : x.last_group,
                           n_next >= V(GROUP) ? n_next / V(GROUP) : 1, highest};
    if (gamma)
        V(split)(&weights, gamma, n, 0);
    if (largest > row->largest) {
        at = V(find)(&x, largest);
        V(raise_largest)(row, largest, first_class + at, gamma ? gamma[at] : 0);
        V(without)(&x, at, -INFINITY);
        if (gamma)
            V(without)(&weights, at, 0);
    }
    if (row->largest == INFINITY) {
        add(&row->sum, V(has_nan)(logits, n) ? NAN : 0);
        seen->x = NULL;
    } else if (gamma) {
        V(add_weighted)(row, &x, &weights, n_groups, exps, seen, NULL);
    } else if (row->shift != 0) {
        V(add_shifted)(row, &x, NULL, n_groups, exps, seen, NULL);
    } else if (exps && writer && writer->from != writer->end) {
        V(add_and_write)(row, &x, NULL, n_groups, exps, seen, writer);
    } else if (exps) {
        V(add_kept)(row, &x, NULL, n_groups, exps, seen, NULL);
    } else {
        V(add_plain)(row, &x, NULL, n_groups, NULL, seen, NULL);
    }
    if (n_next < V(GROUP))
        seen->x = NULL;
    if (exps && at >= 0) /* a larger one may come */
        exps[at] = V(exp_scaled)(V(all)(largest - (V(real))row->shift), V(row_scale)(row))[0];
}

/* What the second pass does to a class: factor, shift and scale as in row_softmax. */
typedef struct {
    V(vector) shift, factor, gamma_factor, largest, log1p_others;
    V(exp_scale) scale;
} V(map_row);

/* One vector of the second pass; with has_exps, `x` holds not the logits but their exponentials, unscaled. */
INLINE V(vector)
    V(map_vector)(second_pass pass, int has_exps, V(vector) x, const V(real) *gamma, const V(map_row) *row)
{
    if (pass == LOG_SOFTMAX)
        return (x - row->largest) - row->log1p_others;
    V(vector) e = has_exps ? x : V(exp_scaled)(x - row->shift, row->scale);
    if (pass == ENTROPY)
        return V(keep)(V(nonzero)(e), e * ((row->largest - x) + row->log1p_others));
    V(vector) p = e * row->factor;
    return gamma ? p - V(load)(gamma) * row->gamma_factor : p;
}

INLINE void V(map_vectors)(second_pass pass, int has_exps, const V(real) *x, const V(real) *gamma,
                           V(real) *out, ptrdiff_t n, const V(map_row) *row)
{
    ptrdiff_t c = 0;
    ptrdiff_t whole = has_exps && !gamma ? n + V(LANES) - 1 : n; /* exponentials fill whole groups */
    for (; c + V(LANES) <= whole; c += V(LANES))
        V(store)(out + c, V(map_vector)(pass, has_exps, V(load)(x + c), gamma ? gamma + c : NULL, row));
    if (c < n) {
        V(real) ALIGNED rest[V(LANES)] = {0}, rest_gamma[V(LANES)] = {0};
        memcpy(rest, x + c, sizeof(V(real)) * (size_t)(n - c));
        if (gamma)
            memcpy(rest_gamma, gamma + c, sizeof(V(real)) * (size_t)(n - c));
        V(store)(rest, V(map_vector)(pass, has_exps, V(load)(rest), gamma ? rest_gamma : NULL, row));
        memcpy(out + c, rest, sizeof(V(real)) * (size_t)(n - c));
    }
}

/* Results of n classes to `out`, from their logits, or from their exponentials if those were kept */
static void V(row_map)(second_pass pass, const V(real) *x, const V(real) *exps, const V(real) *gamma,
                       V(real) *out, ptrdiff_t n, const V(map_row) *row)
{
    if (pass == LOG_SOFTMAX)
        V(map_vectors)(LOG_SOFTMAX, 0, x, NULL, out, n, row);
    else if (exps && gamma)
        V(map_vectors)(GRADIENT, 1, exps, gamma, out, n, row);
    else if (exps)
        V(map_vectors)(GRADIENT, 1, exps, NULL, out, n, row);
    else if (gamma)
        V(map_vectors)(GRADIENT, 0, x, gamma, out, n, row);
    else
        V(map_vectors)(GRADIENT, 0, x, NULL, out, n, row);
}

/* The sum over n classes of the entropy's terms, scaled like the exponentials */
static double V(row_entropy)(const V(real) *x, ptrdiff_t n, const V(map_row) *row)
{
    V(long_sum) sum = {V(all)(0), V(all)(0), V(all)(0)};
    ptrdiff_t c = 0;
    for (; c + V(LANES) <= n; c += V(LANES))
        V(add_term)(&sum, V(map_vector)(ENTROPY, 0, V(load)(x + c), NULL, row), c / V(LANES));
    if (c < n) {
        V(real) ALIGNED rest[V(LANES)];
        V(store)(rest, V(all)(-INFINITY));
        memcpy(rest, x + c, sizeof(V(real)) * (size_t)(n - c));
        V(add_term)(&sum, V(map_vector)(ENTROPY, 0, V(load)(rest), NULL, row), 0);
    }
    return V(lanes_sum)(V(whole)(&sum));
}
#undef V
