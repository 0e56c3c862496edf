/* A block of elements of the losses that have no classes, in one real type; included once for each.
 *
 * BCE with logits, with e = exp(-|x|), small = e/(1 + e), and q the sum of the weights `negative` and
 * `positive` of its two terms (1 - y, y and 1 when there are no others): slope = x < 0 ? -positive : negative
 *     loss = slope*x + q*log1p(e),   gradient = slope - sign(x)*q*small.
 * Where slope is 0 nothing cancels; where not, only what is small next to it.
 *
 * A total alone needs no logarithm of every element where q is 1: the sum of log1p(e) is log1p of one number
 * joined from all e, taken once in 64. This plain way knows no 0*inf = 0, may overflow, and forward alone
 * leaves subnormal numbers aside: a block whose total is no ordinary number is summed again with care. So
 * gradients, which may be to overwrite the logits, are made in a tile.
 */
#define V(name) PASTE(REAL, name)

enum { V(QUAD) = 4 * V(LANES) };
#ifdef REAL_IS_F64
/* PLAIN: no weights, no smoothing, no losses of elements, targets and logits in place. CAREFUL: anything. */
enum { CAREFUL, WEIGHTED, PLAIN };
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
} V(operands);

/* Bytes as reals, none above `largest` */
INLINE V(vector) V(load_bytes)(const uint8_t *p, int largest)
{
#if defined VECTOR_X86 && VECTOR_BYTES >= 32 && !defined REAL_IS_F64
#ifdef VECTOR_AVX512
    __m128i bytes = _mm_min_epu8(_mm_loadu_si128((const __m128i *)p), _mm_set1_epi8((char)largest));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#else
    __m128i bytes = _mm_min_epu8(_mm_loadl_epi64((const __m128i *)p), _mm_set1_epi8((char)largest));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#endif
#else
    V(vector) reals;
    for (int i = 0; i < V(LANES); i++)
        reals[i] = p[i] < largest ? p[i] : largest;
    return reals;
#endif
}

/* (1 + a)*(1 + b) - 1, for a and b not negative as good as they are */
INLINE V(vector) V(join)(V(vector) a, V(vector) b) { return V(fma)(a, b, a + b); }

/* Results whose lines are complete go out while the next are made: a burst of them would let memory wait. */
INLINE void V(drain)(V(real) *stream, const V(real) *out, ptrdiff_t i)
{
    ptrdiff_t first = i - V(QUAD) + V(to_line)(stream);
    for (int j = 0; i > 0 && j < 4; j++)
        V(stream)(stream + first + j * V(LANES), V(load)(out + first + j * V(LANES)));
}

INLINE void V(prefetch)(const void *p, ptrdiff_t offset, int n_bytes)
{
    for (int line = 0; line < n_bytes; line += 64)
        __builtin_prefetch((const char *)p + offset + PREFETCH_BYTES + line);
}

#define EACH for (int j = 0; j < 4; j++)

/* Four vectors step by step; returns the sum of their losses, if PLAIN without log1p(e). */
INLINE V(vector) V(bce_quad)(V(operands) at, ptrdiff_t i, int kind, int bytes, int with_out, V(vector) scale,
                             V(vector) e[4])
{
    const V(vector) one = V(all)(1);
    const V(ivector) minus = (V(ivector))V(all)(-(V(real))0);
    V(vector) x[4], y[4], slope[4], q[4], weight[4];
    EACH x[j] = V(load)(at.x + i + j * V(LANES));
    EACH e[j] = (V(vector))((V(ivector))x[j] | minus);
    V(exp_nonpositive)(e, kind != PLAIN || with_out);
    EACH y[j] = bytes ? V(load_bytes)(at.bytes + i + j * V(LANES), at.largest)
                      : V(load)(at.target + i + j * V(LANES));
#ifdef VECTOR_FMA
    if (kind == PLAIN && !with_out) { /* slope*x, in fewer steps */
        EACH q[j] = V(fma)(-x[j], y[j], V(max)(x[j], V(all)(0)));
        return (q[0] + q[1]) + (q[2] + q[3]);
    }
#endif
    EACH
    {
        V(ivector) below = (V(ivector))x[j] >> (8 * (int)sizeof(V(real)) - 1);
        if (kind == PLAIN)
            slope[j] = (V(vector))((V(ivector))one & ~below) - y[j];
        else {
            V(vector) negative = one - y[j], positive = y[j];
            if (kind == CAREFUL) { /* `negative` is no difference of rounded numbers */
                negative = V(fma)(V(all)(at.keep), negative, V(all)(at.spread));
                positive = V(fma)(V(all)(at.keep), positive, V(all)(at.spread));
            }
            positive *= V(get)(at.pos_weight, i + j * V(LANES));
            weight[j] = V(get)(at.weight, i + j * V(LANES));
            V(ivector) differ = ((V(ivector))negative ^ (V(ivector))-positive) & below;
            slope[j] = (V(vector))((V(ivector))negative ^ differ);
            q[j] = negative + positive;
        }
    }
    if (with_out)
        EACH
        {
            V(vector) small = (V(vector))((V(ivector))e[j] ^ ((V(ivector))x[j] & minus)) / (one + e[j]);
            V(vector) grad = kind == PLAIN ? (slope[j] - small) * scale
                                           : V(fma)(-q[j], small, slope[j]) *
                                                 (V(get)(at.scale, i + j * V(LANES)) * weight[j]);
            V(store)(at.out + i + j * V(LANES), grad);
        }
    if (kind == PLAIN)
        return V(fma)(slope[0], x[0], slope[1] * x[1]) + V(fma)(slope[2], x[2], slope[3] * x[3]);
    EACH e[j] = V(log1p_unit)(e[j]);
    EACH
    {
        if (kind == CAREFUL)
            x[j] = V(keep)(V(nonzero)(slope[j]), V(keep)(V(nonzero)(weight[j]), x[j]));
        q[j] = weight[j] * V(fma)(q[j], e[j], slope[j] * x[j]);
        if (at.loss)
            V(store)(at.loss + i + j * V(LANES), q[j]);
    }
    return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE double V(bce_quads)(V(operands) at, ptrdiff_t n, int kind, int bytes, int with_out)
{
    V(vector) few = V(all)(0), joined = few, scale = V(load)(at.scale.at);
    V(long_sum) sum = {few, few, few};
    for (ptrdiff_t i = 0, number = 0; i < n; i += V(QUAD), number++) {
        V(vector) e[4];
        V(prefetch)(at.x + i, 0, 4 * VECTOR_BYTES);
        if (bytes)
            V(prefetch)(at.bytes, i, V(QUAD));
        else
            V(prefetch)(at.target + i, 0, 4 * VECTOR_BYTES);
        V(add_term)(&sum, V(bce_quad)(at, i, kind, bytes, with_out, scale, e), number);
        if (with_out && at.stream)
            V(drain)(at.stream, at.out, i);
        if (kind != PLAIN)
            continue;
        few = V(join)(few, V(join)(V(join)(e[0], e[1]), V(join)(e[2], e[3])));
        if (number % 4 == 3) { /* in short chains, for the sake of rounding */
            joined = V(join)(joined, few);
            few = V(all)(0);
        }
        if (number % 16 == 15) {
            sum.chain += V(log1p_nonnegative)(joined);
            joined = V(all)(0);
        }
    }
    sum.chain += V(log1p_nonnegative)(V(join)(joined, few));
    return V(lanes_sum)(V(whole)(&sum));
}

#define BCE(kind, bytes, with_out)                                                   \
    static double V(bce_##kind##bytes##with_out)(const V(operands) *at, ptrdiff_t n) \
    {                                                                                \
        return V(bce_quads)(*at, n, kind, bytes, with_out);                          \
    }
BCE(CAREFUL, 0, 0)
BCE(CAREFUL, 0, 1)
BCE(WEIGHTED, 0, 0)
BCE(WEIGHTED, 0, 1)
BCE(PLAIN, 0, 0)
BCE(PLAIN, 0, 1)
#ifndef REAL_IS_F64
BCE(WEIGHTED, 1, 0)
BCE(WEIGHTED, 1, 1)
BCE(PLAIN, 1, 0)
BCE(PLAIN, 1, 1)
#endif

INLINE void V(sigmoid)(const V(operands) *at, ptrdiff_t n, int log)
{
    for (ptrdiff_t i = 0; i < n; i += V(QUAD)) {
        V(vector) e[4], one = V(all)(1), zero = V(all)(0);
        V(prefetch)(at->x + i, 0, 4 * VECTOR_BYTES);
        for (int j = 0; j < 4; j++)
            e[j] = -V(abs)(V(load)(at->x + i + j * V(LANES)));
        V(exp_nonpositive)(e, 1);
        EACH
        {
            V(vector) x = V(load)(at->x + i + j * V(LANES));
            V(mask) above = V(greater)(x, zero);
            V(store)(at->out + i + j * V(LANES), log ? V(choose)(above, zero, x) - V(log1p_unit)(e[j])
                                                     : V(choose)(above, one, e[j]) / (one + e[j]));
        }
        if (at->stream)
            V(drain)(at->stream, at->out, i);
    }
}

/* Losses of probabilities, by the C library's logarithm: no hot path. */
static void V(probability_loss)(pointwise_kind kind, const V(operands) *at, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        double x = at->x[i], y = at->target[i];
        if (kind == BCE) {
            double log_p = fmax(log(x), -100), log_q = fmax(log1p(-x), -100);
            at->loss[i] = (V(real))(-at->weight.at[i & at->weight.step] * (y * log_p + (1 - y) * log_q));
        } else {
            double t = kind == KL_DIV ? y : exp(y), log_t = kind == KL_DIV ? log(y) : y;
            at->loss[i] = (V(real))(t == 0 && !isnan(x) ? 0 : t * (log_t - x));
        }
    }
}

static double V(total)(const V(real) *loss, ptrdiff_t n)
{
    double total[4] = {0, 0, 0, 0};
    for (ptrdiff_t i = 0; i < n; i++)
        total[i % 4] += loss[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

/* Labels -1 and +1 as 0 and 1, in `tile`; returns the first that is neither, or -1. */
static ptrdiff_t V(unsign)(const V(real) **target, ptrdiff_t n, V(real) *tile)
{
    int bad = 0;
    for (ptrdiff_t i = 0; i < n; i += V(LANES)) {
        V(vector) t = V(load)(*target + i), one = V(all)(1);
        bad |= V(any)(V(nonzero)(V(abs)(t) - one));
        V(store)(tile + i, (V(real))0.5 * (t + one));
    }
    *target = tile;
    for (ptrdiff_t i = 0; bad; i++)
        if (tile[i] != 0 && tile[i] != 1)
            return i;
    return -1;
}

static ptrdiff_t V(first_improbable)(const V(operands) *at, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        V(real) x = at->x[i], y = at->target[i];
        if (!(x >= 0 && x <= 1 && y >= 0 && y <= 1))
            return i;
    }
    return -1;
}

static int V(is_number)(const array_view *view)
{
    return !view->data || (view->ndim == 1 && view->stride[0] == 0);
}

/* Elements first ... first + n - 1, followed by `behind` up to `whole` */
static const V(real) *V(operand)(const array_view *view, ptrdiff_t first, ptrdiff_t n, ptrdiff_t whole,
                                 V(real) behind, V(real) *tile)
{
    const V(real) *items = V(items)(view, first, n, tile);
    if (n == whole)
        return items;
    if (items != tile)
        memcpy(tile, items, sizeof(V(real)) * (size_t)n);
    for (ptrdiff_t i = n; i < whole; i++)
        tile[i] = behind;
    return tile;
}

/* The same of coefficients, which are 1 where not given, followed by 0 */
static V(source)
    V(coefficient)(const array_view *view, ptrdiff_t first, ptrdiff_t n, ptrdiff_t whole, V(real) *tile)
{
    static double one = 1;
    static const array_view ones = {
        .data = (char *)&one, .dtype = DTYPE_F64, .ndim = 1, .shape = {PTRDIFF_MAX}};
    if (!view->data)
        view = &ones;
    if (!V(is_number)(view))
        return (V(source)){V(operand)(view, first, n, whole, 0, tile), -1};
    V(load_run)(view->dtype, view->data, 0, V(LANES), tile);
    V(real) number = tile[0];
    for (ptrdiff_t i = 0; n < whole && i < whole; i++)
        tile[i] = i < n ? number : 0;
    return (V(source)){tile, -(n < whole)};
}

/* Whether a run of results can be computed where it is to be */
static int V(fits)(const array_view *view, ptrdiff_t first, ptrdiff_t n)
{
    return V(is_real)(view) && V(last_stride)(view) == (ptrdiff_t)sizeof(V(real)) &&
           V(run_length)(view, first, n) == n;
}

static double V(bce_with_logits)(const pointwise_job *job, V(operands) *at, ptrdiff_t first, ptrdiff_t n,
                                 ptrdiff_t whole, V(real) *target_tile, V(real) *loss_tile)
{
    typedef double pass(const V(operands) *, ptrdiff_t);
    static pass *const passes[3][2][2] = {{{V(bce_CAREFUL00), V(bce_CAREFUL01)}},
#ifdef REAL_IS_F64
                                          {{V(bce_WEIGHTED00), V(bce_WEIGHTED01)}},
                                          {{V(bce_PLAIN00), V(bce_PLAIN01)}}
#else
                                          {{V(bce_WEIGHTED00), V(bce_WEIGHTED01)},
                                           {V(bce_WEIGHTED10), V(bce_WEIGHTED11)}},
                                          {{V(bce_PLAIN00), V(bce_PLAIN01)}, {V(bce_PLAIN10), V(bce_PLAIN11)}}
#endif
    };
    int weighted = job->weight.data || job->pos_weight.data || at->loss || !V(is_number)(&job->scale);
    int kind = job->label_smoothing != 0 ? CAREFUL : weighted ? WEIGHTED : PLAIN;
    double total = passes[kind][at->bytes != NULL][at->out != NULL](at, whole);
    if (isfinite(total) && fabs(total) >= 0x1p-90)
        return total;
    if (at->bytes)
        at->target = V(operand)(&job->target, first, n, whole, 0, target_tile);
    if (!at->loss)
        at->loss = loss_tile;
    V(bce_CAREFUL00)(at, whole);
    return V(total)(at->loss, n);
}

static void V(pointwise_block)(const pointwise_job *job, ptrdiff_t number, block_result *result)
{
    V(real) ALIGNED tile[7][BLOCK_ELEMENTS];
    ptrdiff_t first = number * BLOCK_ELEMENTS;
    ptrdiff_t n = job->n_elements - first < BLOCK_ELEMENTS ? job->n_elements - first : BLOCK_ELEMENTS;
    ptrdiff_t whole = (n + V(QUAD) - 1) / V(QUAD) *V(QUAD);
    const array_view *target = &job->target;
    int loss_fits = job->loss.data && n == whole && V(fits)(&job->loss, first, n);
    V(operands) at = {.x = V(operand)(&job->x, first, n, whole, -(V(real))0x1p100, tile[0]),
                      .weight = V(coefficient)(&job->weight, first, n, whole, tile[2]),
                      .pos_weight = V(coefficient)(&job->pos_weight, first, n, whole, tile[3]),
                      .scale = V(coefficient)(&job->scale, first, n, whole, tile[4]),
                      .loss = loss_fits        ? (V(real) *)(job->loss.data + view_offset(&job->loss, first))
                              : job->loss.data ? tile[5]
                                               : NULL,
                      .out = job->out.data ? tile[6] : NULL,
                      .keep = (V(real))(1 - job->label_smoothing),
                      .spread = (V(real))(job->label_smoothing / 2)};
    if (job->streams && n == whole && V(fits)(&job->out, first, n))
        at.stream = (V(real) *)(job->out.data + view_offset(&job->out, first));
    if (sizeof(V(real)) == sizeof(float) && (target->dtype == DTYPE_U8 || target->dtype == DTYPE_BOOL) &&
        target->data && !job->is_signed && job->kind == BCE_WITH_LOGITS && n == whole &&
        job->label_smoothing == 0 && V(last_stride)(target) == 1 && V(run_length)(target, first, n) == n) {
        at.bytes = (const uint8_t *)target->data + view_offset(target, first);
        at.largest = target->dtype == DTYPE_BOOL ? 1 : UINT8_MAX;
    } else if (target->data)
        at.target = V(operand)(target, first, n, whole, job->is_signed ? -1 : 0, tile[1]);
    ptrdiff_t bad = job->is_signed     ? V(unsign)(&at.target, whole, tile[1])
                    : job->kind == BCE ? V(first_improbable)(&at, n)
                                       : -1;
    if (bad >= 0) {
        result->first_bad = first + bad;
        return;
    }
    switch (job->kind) {
    case BCE_WITH_LOGITS:
        result->total = V(bce_with_logits)(job, &at, first, n, whole, tile[1], tile[5]);
        break;
    case SIGMOID: V(sigmoid)(&at, whole, 0); break;
    case LOG_SIGMOID: V(sigmoid)(&at, whole, 1); break;
    default:
        at.loss = loss_fits ? at.loss : tile[5];
        V(probability_loss)(job->kind, &at, n);
        result->total = V(total)(at.loss, n);
    }
    if (job->loss.data && !loss_fits)
        V(store_items)(&job->loss, first, n, tile[5]);
    if (!job->out.data)
        return;
    if (at.stream) {
        ptrdiff_t head = V(to_line)(at.stream), done = head + n - V(QUAD);
        V(stream_run)(at.stream, head, at.out);
        V(stream_run)(at.stream + done, n - done, at.out + done);
        fence();
    } else
        V(store_items)(&job->out, first, n, tile[6]);
}
#undef BCE
#undef V
