/* The second pass over classes next to each other, in one real type: a result for each, from logits or from
 * their kept exponentials, or a sum over them; included once for each type.
 */
#define V(name) PASTE(REAL, name)

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
