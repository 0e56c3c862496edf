/* Binary cross-entropy of logits, whole blocks of it, in one real type; included once for each.
 *
 * With e = exp(-|x|), small = e/(1 + e), and q the sum of the weights `negative` and `positive` of its two
 * terms (1 - y, y and 1 when there are no others): slope = x < 0 ? -positive : negative
 *     loss = slope*x + q*log1p(e),   gradient = slope - sign(x)*q*small.
 * Where slope is 0 nothing cancels; where not, only what is small next to it.
 *
 * A total alone needs no logarithm of every element where q is 1: the sum of log1p(e) is log1p of one number
 * joined from all e, taken once in 64 (and so by class where targets are 0 or 1 and the positive have one
 * weight). This plain way knows no 0*inf = 0, may overflow, and forward alone leaves subnormal numbers aside:
 * a block whose total is no ordinary number is summed again with care. So gradients, which may be to
 * overwrite the logits, are made in a tile.
 */
#define V(name) PASTE(REAL, name)

enum { V(QUAD) = 4 * V(LANES), V(PRODUCT) = 16 * V(QUAD), V(PRODUCTS) = BLOCK_ELEMENTS / V(PRODUCT) };
#ifdef REAL_IS_F64
/* PLAIN: no weights, no smoothing, no losses of elements. HARD: targets 0 and 1 besides. BY_CLASS: the same,
 * but for one `pos_weight`. CAREFUL: anything. */
enum { CAREFUL, WEIGHTED, PLAIN, HARD, BY_CLASS };
#endif

/* Where the reals of an operand are: in place or in a tile, -1 for `step`; or one vector for all, 0. */
typedef struct {
    const V(real) *at;
    ptrdiff_t step;
} V(source);

INLINE V(vector) V(get)(V(source) from, ptrdiff_t i) { return V(load)(from.at + (i & from.step)); }

/* Whole quads of vectors. What lies behind the block's elements adds nothing to a total: x = -2^100, and all
 * else 0. */
typedef struct {
    const V(real) *x, *target;
    V(source) weight, pos_weight, scale;
    const uint8_t *bytes; /* the target where it is of bytes, each at most `largest`; else NULL */
    int largest;
    V(real) *loss, *out;  /* or NULL */
    V(real) *stream;      /* where `out` goes around the cache, or NULL */
    V(real) keep, spread; /* 1 - label_smoothing, and half of it to either class */
    distances behind;     /* of what is fetched */
} V(operands);

/* Bytes as reals, none above `largest`, in two vectors */
INLINE void V(load_bytes)(const uint8_t *p, int largest, V(vector) reals[2])
{
#if defined VECTOR_AVX512 && !defined REAL_IS_F64
    __m256i bytes = _mm256_min_epu8(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8((char)largest));
    reals[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
    reals[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
#elif defined VECTOR_AVX2 && !defined REAL_IS_F64
    /* All sixteen in either half, which takes its own of them: nothing has to cross. */
    const __m256i own = _mm256_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 4, -1,
                                         -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7, -1, -1, -1);
    __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    bytes = _mm256_min_epu8(bytes, _mm256_set1_epi8((char)largest));
    reals[0] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, own));
    reals[1] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, _mm256_or_si256(own, _mm256_set1_epi8(8))));
#else
    for (int i = 0; i < 2 * V(LANES); i++)
        reals[i / V(LANES)][i % V(LANES)] = p[i] < largest ? p[i] : largest;
#endif
}

/* A minus where the target is 1; `soft` collects bits of targets that are neither 0 nor 1. */
INLINE void V(load_sign)(V(vector) y, V(vector) *minus, V(ivector) *soft)
{
    *soft |= (V(ivector))V(fma)(y, y, -y);
    *minus = V(keep)(V(equal)(y, V(all)(1)), V(all)(-(V(real))0));
}

/* The same of bytes, in two vectors */
INLINE void V(load_signs)(const uint8_t *p, int largest, V(vector) minus[2], V(ivector) *soft)
{
#if defined VECTOR_AVX2 && !defined REAL_IS_F64
    const __m256i own = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1,
                                         -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
    __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    bytes = _mm256_min_epu8(bytes, _mm256_set1_epi8((char)largest));
    *soft |= (V(ivector))_mm256_and_si256(bytes, _mm256_set1_epi8(~1));
    bytes = _mm256_slli_epi32(bytes, 7);
    minus[0] = (V(vector))_mm256_shuffle_epi8(bytes, own);
    minus[1] = (V(vector))_mm256_shuffle_epi8(bytes, _mm256_or_si256(own, _mm256_set1_epi8(8)));
#else
    V(vector) y[2];
    V(load_bytes)(p, largest, y);
    for (int j = 0; j < 2; j++)
        V(load_sign)(y[j], minus + j, soft);
#endif
}

INLINE void V(load_targets)(const V(operands) *at, ptrdiff_t i, int bytes, V(vector) y[4])
{
    for (int j = 0; j < 4; j += 2)
        if (bytes)
            V(load_bytes)(at->bytes + i + j * V(LANES), at->largest, y + j);
        else {
            y[j] = V(load)(at->target + i + j * V(LANES));
            y[j + 1] = V(load)(at->target + i + (j + 1) * V(LANES));
        }
}

/* Results whose lines are complete go out while the next are made: a burst of them would let memory wait. */
INLINE void V(drain)(V(real) *stream, const V(real) *out, ptrdiff_t i)
{
    ptrdiff_t first = i - V(QUAD) + V(to_line)(stream);
    for (int j = 0; i > 0 && j < 4; j++)
        V(stream)(stream + first + j * V(LANES), V(load)(out + first + j * V(LANES)));
}

INLINE void V(fetch_operands)(const V(operands) *at, ptrdiff_t i, int bytes)
{
    fetch_ahead(at->x + i, 4 * VECTOR_BYTES, at->behind);
    if (bytes)
        fetch_ahead(at->bytes + i, V(QUAD), at->behind);
    else
        fetch_ahead(at->target + i, 4 * VECTOR_BYTES, at->behind);
}

#define EACH for (int j = 0; j < 4; j++)

/* All ones where x has a minus, and its sign bit alone */
INLINE V(ivector) V(below)(V(vector) x) { return (V(ivector))x >> (8 * (int)sizeof(V(real)) - 1); }
INLINE V(ivector) V(sign)(V(vector) x) { return (V(ivector))x & (V(ivector))V(all)(-(V(real))0); }
INLINE V(vector) V(minus_abs)(V(vector) x)
{
    return (V(vector))((V(ivector))x | (V(ivector))V(all)(-(V(real))0));
}

/* a where there is a minus in `sign`, else b */
INLINE V(vector) V(by_sign)(V(vector) sign, V(vector) a, V(vector) b)
{
#if defined VECTOR_AVX2
#ifdef REAL_IS_F64
    return _mm256_blendv_pd(b, a, sign);
#else
    return _mm256_blendv_ps(b, a, sign);
#endif
#elif defined VECTOR_AVX512
    return V(choose)(V(equal_bits)(V(below)(sign), V(all_bits)(-1)), a, b);
#else
    return V(choose)(V(below)(sign), a, b);
#endif
}

/* sign(x)*e/(1 + e) */
INLINE V(vector) V(signed_small)(V(vector) x, V(vector) e, V(vector) one_plus)
{
    return (V(vector))((V(ivector))e ^ V(sign)(x)) / one_plus;
}

/* Four vectors step by step; returns the sum of their losses. */
INLINE V(vector) V(bce_quad)(const V(operands) *at, ptrdiff_t i, int kind, int bytes, int with_out)
{
    const V(vector) one = V(all)(1);
    V(vector) x[4], y[4], e[4], slope[4], q[4], weight[4];
    EACH x[j] = V(load)(at->x + i + j * V(LANES));
    EACH e[j] = V(minus_abs)(x[j]);
    V(exp_nonpositive)(e, 1);
    V(load_targets)(at, i, bytes, y);
    EACH
    {
        V(vector) negative = one - y[j], positive = y[j];
        if (kind == CAREFUL) { /* `negative` is no difference of rounded numbers */
            negative = V(fma)(V(all)(at->keep), negative, V(all)(at->spread));
            positive = V(fma)(V(all)(at->keep), positive, V(all)(at->spread));
        }
        positive *= V(get)(at->pos_weight, i + j * V(LANES));
        weight[j] = V(get)(at->weight, i + j * V(LANES));
        V(ivector) differ = ((V(ivector))negative ^ (V(ivector))-positive) & V(below)(x[j]);
        slope[j] = (V(vector))((V(ivector))negative ^ differ);
        q[j] = negative + positive;
    }
    if (with_out)
        EACH
        {
            V(vector) scale = V(get)(at->scale, i + j * V(LANES)) * weight[j];
            V(vector) small = V(signed_small)(x[j], e[j], one + e[j]);
            V(store)(at->out + i + j * V(LANES), V(fma)(-q[j], small, slope[j]) * scale);
        }
    EACH e[j] = V(log1p_unit)(e[j]);
    EACH
    {
        if (kind == CAREFUL)
            x[j] = V(keep)(V(nonzero)(slope[j]), V(keep)(V(nonzero)(weight[j]), x[j]));
        q[j] = weight[j] * V(fma)(q[j], e[j], slope[j] * x[j]);
        if (at->loss)
            V(store)(at->loss + i + j * V(LANES), q[j]);
    }
    return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE double V(bce_quads)(V(operands) at, ptrdiff_t n, int kind, int bytes, int with_out)
{
    V(long_sum) sum = {V(all)(0), V(all)(0), V(all)(0)};
    for (ptrdiff_t i = 0; i < n; i += V(QUAD)) {
        V(fetch_operands)(&at, i, bytes);
        V(add_term)(&sum, V(bce_quad)(&at, i, kind, bytes, with_out), i / V(QUAD));
        if (with_out && at.stream)
            V(drain)(at.stream, at.out, i);
    }
    return V(lanes_sum)(V(whole)(&sum));
}

/* What is left of a product once its e are joined: by class if BY_CLASS, else in the first */
typedef struct {
    V(vector) by_class[2][4];
} V(joined);

INLINE void V(join_to)(V(vector) *product, V(vector) one_plus, V(vector) e)
{
    *product = V(fma)(*product, one_plus, e);
}

/* Of targets 0 and 1, z = x with its sign changed for 1: loss = max(z, 0) + log1p(e), each times the class's
 * weight, and gradient = sigmoid(z), times that weight and 1 or -1. PLAIN, HARD or BY_CLASS; NaN if the
 * targets are not hard after all */
INLINE double V(bce_products)(V(operands) at, ptrdiff_t n, int kind, int bytes, int with_out)
{
    const V(vector) zero = V(all)(0), one = V(all)(1);
    const V(vector) scale = V(load)(at.scale.at), pos_weight = V(load)(at.pos_weight.at);
    V(long_sum) sum = {zero, zero, zero};
    V(joined) products[V(PRODUCTS)];
    V(ivector) soft = {0};
    int n_products = 0;
    for (ptrdiff_t i = 0; i < n; n_products++) {
        ptrdiff_t end = n - i < V(PRODUCT) ? n : i + V(PRODUCT);
        V(joined) product = {{{zero, zero, zero, zero}, {zero, zero, zero, zero}}};
        for (; i < end; i += V(QUAD)) {
            V(vector) x[4], y[4], e[4], slope[4];
            V(fetch_operands)(&at, i, bytes);
            if (kind == PLAIN)
                V(load_targets)(&at, i, bytes, y);
            else /* y is a sign */
                for (int j = 0; j < 4; j += 2)
                    if (bytes)
                        V(load_signs)(at.bytes + i + j * V(LANES), at.largest, y + j, &soft);
                    else
                        for (int k = j; k < j + 2; k++)
                            V(load_sign)(V(load)(at.target + i + k * V(LANES)), y + k, &soft);
            EACH x[j] = V(load)(at.x + i + j * V(LANES));
            EACH e[j] = V(minus_abs)(x[j]);
            V(vector) linear = zero; /* the sum of slope*x */
            if (kind >= HARD)
                EACH
                {
                    x[j] = (V(vector))((V(ivector))x[j] ^ (V(ivector))y[j]);
                    V(vector) wrong = V(max)(zero, x[j]);
                    if (kind == BY_CLASS)
                        linear = V(fma)(V(by_sign)(y[j], pos_weight, one), wrong, linear);
                    else
                        linear += wrong;
                }
            else if (with_out || !IS_FUSED) /* a rounded product would cancel the logit */
                EACH
                {
                    slope[j] = (V(vector))((V(ivector))one & ~V(below)(x[j])) - y[j];
                    linear = V(fma)(slope[j], x[j], linear);
                }
            else /* in fewer steps */
                EACH linear += V(fma)(-x[j], y[j], V(max)(x[j], zero));
            sum.chain += linear;
            V(exp_nonpositive)(e, with_out);
            EACH
            {
                V(vector) one_plus = one + e[j], grad;
                if (with_out && kind == PLAIN)
                    grad = (slope[j] - V(signed_small)(x[j], e[j], one_plus)) * scale;
                else if (with_out) {
                    V(vector) own = kind == HARD ? scale : V(by_sign)(y[j], pos_weight * scale, scale);
                    grad = V(by_sign)(x[j], e[j], one) / one_plus * own;
                    grad = (V(vector))((V(ivector))grad ^ (V(ivector))y[j]);
                }
                if (with_out)
                    V(store)(at.out + i + j * V(LANES), grad);
                if (kind == BY_CLASS) {
                    V(vector) part = V(by_sign)(y[j], e[j], zero);
                    V(join_to)(&product.by_class[1][j], one + part, part);
                    e[j] -= part;
                    one_plus = one + e[j];
                }
                V(join_to)(&product.by_class[0][j], one_plus, e[j]);
            }
            if (with_out && at.stream)
                V(drain)(at.stream, at.out, i);
        }
        V(fold)(&sum);
        products[n_products] = product;
    }
    for (int k = 0; k < n_products; k++) /* after all: one waits for no other */
        for (int positive = 0; positive <= (kind == BY_CLASS); positive++) {
            V(vector) *product = products[k].by_class[positive];
            for (int j = 1; j < 4; j++)
                V(join_to)(product, one + product[j], product[j]);
            V(vector) log = V(log1p_nonnegative)(*product);
            sum.chain += positive ? pos_weight * log : log;
        }
    V(bits) is_soft = 0;
    for (int j = 0; j < V(LANES); j++)
        is_soft |= soft[j];
    return is_soft ? NAN : V(lanes_sum)(V(whole)(&sum));
}

#define BCE(kind, bytes, with_out)                                                   \
    static double V(bce_##kind##bytes##with_out)(const V(operands) *at, ptrdiff_t n) \
    {                                                                                \
        return kind >= PLAIN ? V(bce_products)(*at, n, kind, bytes, with_out)        \
                             : V(bce_quads)(*at, n, kind, bytes, with_out);          \
    }
BCE(CAREFUL, 0, 0)
BCE(CAREFUL, 0, 1)
BCE(WEIGHTED, 0, 0)
BCE(WEIGHTED, 0, 1)
BCE(PLAIN, 0, 0)
BCE(PLAIN, 0, 1)
BCE(HARD, 0, 1)
BCE(BY_CLASS, 0, 0)
BCE(BY_CLASS, 0, 1)
#ifndef REAL_IS_F64
BCE(WEIGHTED, 1, 0)
BCE(WEIGHTED, 1, 1)
BCE(PLAIN, 1, 0)
BCE(PLAIN, 1, 1)
BCE(HARD, 1, 1)
BCE(BY_CLASS, 1, 0)
BCE(BY_CLASS, 1, 1)
#endif
#undef BCE
#undef V
