/* Rows whose classes lie next to each other, in one real type; included once for each.
 *
 * row_statistics_of reads a run of classes once. It works on groups of eight vectors, which fit the
 * registers: their largest is compared with the row's, and where it is larger, becomes the row's, while its
 * predecessor joins the others. Then the exponentials are added to the sum; a group that holds the largest is
 * summed from a copy without it. A look ahead over the first groups makes larger ones rare. row_map writes a
 * result for each class.
 */
#define V(name) PASTE(REAL, name)

/* The largest exponential of a row is about 2^HEADROOM, so that those of classes whose probability is no
 * normal number still are. */
enum { V(GROUP) = 8 * V(LANES), V(HEADROOM) = sizeof(V(real)) == 8 ? 60 : 30 };

/* Groups whose largest is found before any is summed: in rows of 1000 that spares two raises of three. */
#define LOOK_AHEAD 8

/* Without it memory and arithmetic take turns. Past the row's end it fetches the next row, or nothing. */
#define PREFETCH_BYTES 8192

/* The place of a largest logit that the look ahead has found, but the sums have not. */
#define NOT_REACHED (-1)

/* How far sum's exponent may stay behind a larger logit's before it is raised; far from overflow. */
#define MARGIN 40

typedef struct {
    V(long_sum) sum, weight, gap; /* by lane, since the largest was raised */
    ptrdiff_t n_groups;
    V(vector) largest, shift, reference;
    V(exp_scale) scale;
    row_statistics row;
} V(accumulator);

static void V(collect)(V(accumulator) *acc, int has_gamma)
{
    V(long_sum) empty = {V(all)(0), V(all)(0), V(all)(0)};
    if (acc->n_groups == 0)
        return;
    acc->row.sum += V(lanes_sum)(V(whole)(&acc->sum));
    acc->sum = empty;
    if (has_gamma) {
        add(&acc->row.weight, V(lanes_sum)(V(whole)(&acc->weight)));
        add(&acc->row.gap, V(lanes_sum)(V(whole)(&acc->gap)));
        acc->weight = acc->gap = empty;
    }
    acc->n_groups = 0;
}

INLINE V(vector) V(tree)(const V(vector) *v)
{
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

/* Add vectors without a logit larger than the largest; at the largest itself `x` holds -inf and `gamma` 0. */
INLINE void V(add_group)(V(accumulator) *acc, const V(real) *x, const V(real) *gamma, int n_vectors)
{
    V(vector) zero = V(all)(0);
    V(vector) e[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
    V(vector) weight[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
    V(vector) gap[8] = {zero, zero, zero, zero, zero, zero, zero, zero};
#pragma GCC unroll 8
    for (int j = 0; j < n_vectors; j++) {
        V(vector) logit = V(load)(x + j * V(LANES));
        e[j] = V(exp_scaled)(logit - acc->shift, acc->scale);
        if (gamma) {
            weight[j] = V(load)(gamma + j * V(LANES));
            gap[j] = V(keep)(V(nonzero)(weight[j]), weight[j] * (acc->reference - logit));
        }
    }
    V(add_term)(&acc->sum, V(tree)(e), acc->n_groups);
    if (gamma) {
        V(add_term)(&acc->weight, V(tree)(weight), acc->n_groups);
        V(add_term)(&acc->gap, V(tree)(gap), acc->n_groups);
    }
    acc->n_groups++;
}

/* May sums go on with the same shift and exponent when `largest` becomes the largest? */
INLINE int V(fits_scale)(const row_statistics *row, V(real) largest)
{
    return row->largest > -INFINITY && row->shift == 0 && fabs(largest) <= DIRECT &&
           largest * 0x1.71547652b82fep0 - V(HEADROOM) <= row->exponent + MARGIN;
}

/* Make `largest` the row's; its predecessor joins the others. The caller says where it is. */
static void V(raise_largest)(V(accumulator) *acc, V(real) largest, int has_gamma)
{
    row_statistics *row = &acc->row;
    int fits = V(fits_scale)(row, largest);
    if (fits && !has_gamma) {
        row->sum += V(exp_scaled)(acc->largest, acc->scale)[0];
        row->largest = largest;
        acc->largest = V(all)(largest);
        return;
    }
    V(collect)(acc, has_gamma);
    row_statistics next = {.largest = largest, .top = NOT_REACHED};
    if (fits) {
        next.exponent = row->exponent;
    } else if (fabs(largest) <= DIRECT) {
        next.exponent = rint(largest * 0x1.71547652b82fep0) - V(HEADROOM);
    } else if (largest < INFINITY) {
        next.shift = largest;
        next.exponent = -V(HEADROOM);
    }
    merge(row, &next);
    acc->largest = V(all)(largest);
    acc->reference = V(all)(largest);
    acc->shift = V(all)((V(real))row->shift);
    acc->scale = V(exp_scale_of)(V(all)((V(real))row->exponent));
}

/* The group that holds the largest logit, at `at` */
static __attribute__((noinline)) void V(add_top_group)(V(accumulator) *acc, const V(real) *x,
                                                       const V(real) *gamma, int n_vectors, ptrdiff_t at)
{
    V(real) ALIGNED others[V(GROUP)], others_gamma[V(GROUP)];
    for (int j = 0; j < n_vectors; j++)
        V(store)(others + j * V(LANES), V(load)(x + j * V(LANES)));
    others[at] = -INFINITY;
    for (int j = 0; j < n_vectors && gamma; j++)
        V(store)(others_gamma + j * V(LANES), V(load)(gamma + j * V(LANES)));
    others_gamma[at] = 0;
    if (gamma)
        V(add_group)(acc, others, others_gamma, n_vectors);
    else
        V(add_group)(acc, others, NULL, n_vectors);
}

/* The largest by lane */
INLINE V(vector) V(highest)(const V(real) *x, ptrdiff_t n_vectors)
{
    V(vector) low = V(all)(-INFINITY), high[4] = {low, low, low, low};
    ptrdiff_t j = 0;
    for (; j + 4 <= n_vectors; j += 4)
        for (int k = 0; k < 4; k++)
            high[k] = V(max)(V(load)(x + (j + k) * V(LANES)), high[k]);
    for (; j < n_vectors; j++)
        high[0] = V(max)(V(load)(x + j * V(LANES)), high[0]);
    return V(max)(V(max)(high[0], high[1]), V(max)(high[2], high[3]));
}

/* A group in which something is as large as the largest so far: it may be larger, the one that the look ahead
 * found, or its equal. */
static __attribute__((noinline)) void V(add_high_group)(V(accumulator) *acc, const V(real) *x,
                                                        const V(real) *gamma, int n_vectors,
                                                        ptrdiff_t first_class, V(vector) high)
{
    row_statistics *row = &acc->row;
    V(real) largest = V(lanes_max)(high);
    ptrdiff_t at = 0;
    if (largest > row->largest || (row->top == NOT_REACHED && largest > -INFINITY)) {
        while (!V(any)(V(not_below)(V(load)(x + at), V(all)(largest))))
            at += V(LANES);
        while (x[at] != largest)
            at++;
        if (largest > row->largest)
            V(raise_largest)(acc, largest, gamma != NULL);
        row->top = first_class + at;
        row->top_weight = gamma ? gamma[at] : 0;
        V(add_top_group)(acc, x, gamma, n_vectors, at);
    } else if (gamma) {
        V(add_group)(acc, x, gamma, n_vectors);
    } else {
        V(add_group)(acc, x, NULL, n_vectors);
    }
}

INLINE void V(add_checked_group)(V(accumulator) *acc, const V(real) *x, const V(real) *gamma, int n_vectors,
                                 ptrdiff_t first_class)
{
    V(vector) high = V(highest)(x, n_vectors);
    if (V(any)(V(not_below)(high, acc->largest)))
        V(add_high_group)(acc, x, gamma, n_vectors, first_class, high);
    else
        V(add_group)(acc, x, gamma, n_vectors);
}

INLINE void V(add_classes)(V(accumulator) *acc, const V(real) *x, const V(real) *gamma, ptrdiff_t n,
                           ptrdiff_t first_class)
{
    ptrdiff_t c = 0, n_groups = n / V(GROUP);
    V(real) ahead = V(lanes_max)(V(highest)(x, 8 * (n_groups < LOOK_AHEAD ? n_groups : LOOK_AHEAD)));
    if (ahead > -INFINITY)
        V(raise_largest)(acc, ahead, gamma != NULL);
    for (; c + V(GROUP) <= n; c += V(GROUP)) {
        for (size_t line = 0; line < sizeof(V(real)) * V(GROUP); line += 64)
            __builtin_prefetch((const char *)(x + c) + PREFETCH_BYTES + line);
        V(add_checked_group)(acc, x + c, gamma ? gamma + c : NULL, 8, first_class + c);
    }
    if (c < n) {
        V(real) ALIGNED rest[V(GROUP)], rest_gamma[V(GROUP)];
        int n_vectors = (int)((n - c + V(LANES) - 1) / V(LANES));
        V(store)(rest + (n_vectors - 1) * V(LANES), V(all)(-INFINITY));
        V(store)(rest_gamma + (n_vectors - 1) * V(LANES), V(all)(0));
        memcpy(rest, x + c, sizeof(V(real)) * (size_t)(n - c));
        if (gamma)
            memcpy(rest_gamma, gamma + c, sizeof(V(real)) * (size_t)(n - c));
        V(add_checked_group)(acc, rest, gamma ? rest_gamma : NULL, n_vectors, first_class + c);
    }
}

/* The statistics of n classes from first_class on; gamma, by class, may be NULL. */
static void V(row_statistics_of)(const V(real) *x, const V(real) *gamma, ptrdiff_t n, ptrdiff_t first_class,
                                 row_statistics *row)
{
    V(long_sum) empty = {V(all)(0), V(all)(0), V(all)(0)};
    V(accumulator) acc;
    acc.sum = acc.weight = acc.gap = empty;
    acc.n_groups = 0;
    acc.largest = V(all)(-INFINITY);
    acc.shift = acc.reference = V(all)(0);
    acc.scale = V(exp_scale_of)(V(all)(0));
    acc.row = (row_statistics){.largest = -INFINITY, .top = NOT_REACHED};
    if (gamma)
        V(add_classes)(&acc, x, gamma, n, first_class);
    else
        V(add_classes)(&acc, x, NULL, n, first_class);
    V(collect)(&acc, gamma != NULL);
    *row = acc.row;
    if (row->largest == -INFINITY)
        row->top = first_class;
    if (isinf(row->largest)) {
        row->sum = 0;
        for (ptrdiff_t c = 0; c < n; c++)
            row->sum += isnan(x[c]) ? NAN : 0;
    }
}

/* What the second pass does to a class: factor, shift and scale as in row_softmax. */
typedef struct {
    V(vector) shift, factor, gamma_factor, largest, log1p_others;
    V(exp_scale) scale;
} V(map_row);

INLINE V(vector) V(map_vector)(second_pass pass, V(vector) x, const V(real) *gamma, const V(map_row) *row)
{
    if (pass == LOG_SOFTMAX)
        return (x - row->largest) - row->log1p_others;
    V(vector) e = V(exp_scaled)(x - row->shift, row->scale);
    if (pass == ENTROPY)
        return V(keep)(V(nonzero)(e), e * ((row->largest - x) + row->log1p_others));
    V(vector) p = e * row->factor;
    return gamma ? p - V(load)(gamma) * row->gamma_factor : p;
}

/* Results of n classes to `out`; returns the sum of exponentials (of terms, for the entropy), scaled like
 * them. */
INLINE double V(map_classes)(second_pass pass, const V(real) *x, const V(real) *gamma, V(real) *out,
                             ptrdiff_t n, const V(map_row) *row, int streams)
{
    ptrdiff_t c = 0;
    if (pass == ENTROPY) {
        V(long_sum) sum = {V(all)(0), V(all)(0), V(all)(0)};
        for (; c + V(LANES) <= n; c += V(LANES))
            V(add_term)(&sum, V(map_vector)(pass, V(load)(x + c), NULL, row), c / V(LANES));
        if (c < n) {
            V(real) ALIGNED rest[V(LANES)];
            V(store)(rest, V(all)(-INFINITY));
            memcpy(rest, x + c, sizeof(V(real)) * (size_t)(n - c));
            V(add_term)(&sum, V(map_vector)(pass, V(load)(rest), NULL, row), 0);
        }
        return V(lanes_sum)(V(whole)(&sum));
    }
    if (streams && (uintptr_t)out % sizeof(V(vector)) == 0)
        for (; c + V(LANES) <= n; c += V(LANES))
            V(stream)(out + c, V(map_vector)(pass, V(load)(x + c), gamma ? gamma + c : NULL, row));
    for (; c + V(LANES) <= n; c += V(LANES))
        V(store)(out + c, V(map_vector)(pass, V(load)(x + c), gamma ? gamma + c : NULL, row));
    if (c < n) {
        V(real) ALIGNED rest[V(LANES)] = {0}, rest_gamma[V(LANES)] = {0};
        memcpy(rest, x + c, sizeof(V(real)) * (size_t)(n - c));
        if (gamma)
            memcpy(rest_gamma, gamma + c, sizeof(V(real)) * (size_t)(n - c));
        V(store)(rest, V(map_vector)(pass, V(load)(rest), gamma ? rest_gamma : NULL, row));
        memcpy(out + c, rest, sizeof(V(real)) * (size_t)(n - c));
    }
    return 0;
}

static double V(row_map)(second_pass pass, const V(real) *x, const V(real) *gamma, V(real) *out, ptrdiff_t n,
                         const V(map_row) *row, int streams)
{
    switch (pass) {
    case ENTROPY: return V(map_classes)(ENTROPY, x, NULL, NULL, n, row, 0);
    case LOG_SOFTMAX: return V(map_classes)(LOG_SOFTMAX, x, NULL, out, n, row, streams);
    default:
        if (gamma)
            return V(map_classes)(GRADIENT, x, gamma, out, n, row, streams);
        return V(map_classes)(GRADIENT, x, NULL, out, n, row, streams);
    }
}
#undef V
