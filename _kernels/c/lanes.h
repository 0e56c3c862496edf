/* Rows side by side, one in each lane, in one real type: what is done to runs of classes; included once for
 * each type. lanes_block.h puts it together.
 *
 * x is class-major: `x_stride` reals from one class to the next. sum_classes takes the exponentials of a few
 * classes of all rows, relative to each row's first logit; of the running largest exponential and the next
 * one, the smaller joins the others' sum, so no largest logit is sought beforehand. A row that rises too far
 * above its first logit (or holds NaN, or has coefficients by class) is summed again once its largest is
 * known.
 */
#define V(name) PASTE(REAL, name)

enum {
    /* A row's first exponential is about 2^LANES_HEADROOM, so that those of classes whose probability is no
     * normal number still are; its largest may come to 2^LANES_MOST. */
    V(LANES_HEADROOM) = sizeof(V(real)) == 8 ? 60 : 30,
    V(LANES_MOST) = sizeof(V(real)) == 8 ? 800 : 80,
    /* Classes a sweep takes at a time: as many streams from memory */
    V(SWEEP) = 8,
    V(AHEAD) = 512 / sizeof(V(real)),
    /* The padding keeps what belongs to a row, or to its classes, out of one set of the cache. */
    V(LANES_STRIDE) = LANES_ROWS + V(LINE),
    /* Of more a plain gradient, which has one more rounding, needs what the sum lost. */
    V(LABELS_FEW) = 2 * V(SWEEP),
    V(LANES_TILE) = LANES_TILE_BYTES / sizeof(V(real)) + V(LINE),
    V(FLAT_TILE) = LANES_SHORT_BYTES / sizeof(V(real)) + V(LINE) /* what precedes the rows included */
};

/* Gradients that are to be written of n rows, of which `done` rows or classes are (lanes_gradients.h). Those
 * written last ended at `end`, if it is not NULL, amid a line which still is to be written. */
typedef struct {
    int is_flat, streams, continues;
    ptrdiff_t n, n_classes, done;
    V(real) *power, *out, *end;
    V(real) ALIGNED factor[V(LANES_STRIDE)];
    /* Of flat ones: where the first whole line begins, and after the last */
    ptrdiff_t head, tail;
    /* Of others */
    ptrdiff_t done_in_class, stride, out_stride;
    V(real) ALIGNED carried[LANES_PLAIN_CLASSES][2 * V(LINE)];
} V(unwritten);

typedef struct {
    const softmax_job *job;
    ptrdiff_t first, n, width; /* `width` is n in whole vectors */
    int all_live;
    const char *labels_ahead; /* the next block's */
    /* Of sums over the others: what they lose to rounding is kept apart. peak is the largest exponential. */
    V(real) ALIGNED largest[V(LANES_STRIDE)], peak[V(LANES_STRIDE)];
    V(real) ALIGNED sum[V(LANES_STRIDE)], sum_lost[V(LANES_STRIDE)], seen[V(LANES_STRIDE)];
    V(real) ALIGNED weight[V(LANES_STRIDE)], weight_lost[V(LANES_STRIDE)], top_weight[V(LANES_STRIDE)];
    V(real) ALIGNED gap[V(LANES_STRIDE)], gap_lost[V(LANES_STRIDE)];
    V(real) ALIGNED shift[V(LANES_STRIDE)], exponent[V(LANES_STRIDE)]; /* as in statistics.h */
    V(real) ALIGNED is_summed[V(LANES_STRIDE)], live[V(LANES_STRIDE)];
    V(real) ALIGNED target_logit[V(LANES_STRIDE)], beta[V(LANES_STRIDE)], label_gamma[V(LANES_STRIDE)];
    V(real) ALIGNED scale[V(LANES_STRIDE)], loss[V(LANES_STRIDE)];
    V(real) ALIGNED factor[V(LANES_STRIDE)], log1p_others[V(LANES_STRIDE)];
    V(real) ALIGNED label_entry[V(LANES_STRIDE)], top_entry[V(LANES_STRIDE)];
    V(bits) ALIGNED label[V(LANES_STRIDE)], top[V(LANES_STRIDE)]; /* label -1: ignored */
    V(bits) ALIGNED n_before[V(LANES_STRIDE)];
    V(exp_scale) exp_scale[V(LANES_STRIDE) / V(LANES)];
    /* Of lanes_labels.h */
    int some_plain;
    V(real) ALIGNED is_plain[V(LANES_STRIDE)], plain_loss[V(LANES_STRIDE)];
    V(real) ALIGNED plain_factor[V(LANES_STRIDE)], plain_entry[V(LANES_STRIDE)];
    double ALIGNED lse[V(LANES_STRIDE)], lse_in[V(LANES_STRIDE)];
    V(unwritten) unwritten;
    V(bits) ALIGNED row_of[LANES_PLAIN_CLASSES * V(LANES)]; /* of lanes_gradients.h */
    V(real) *x_tile, *gamma_tile;
    V(real) ALIGNED tile[2][V(LANES_TILE)];
} V(lanes);

INLINE void V(use_tiles)(V(lanes) *rows) { rows->x_tile = rows->tile[0], rows->gamma_tile = rows->tile[1]; }

INLINE void V(take_rows)(V(lanes) *rows, ptrdiff_t n)
{
    rows->n = n;
    rows->width = (n + V(LANES) - 1) / V(LANES) *V(LANES);
}

/* n rows of a job from `first` on, of which nothing is known yet */
INLINE void V(begin_lanes)(V(lanes) *rows, const softmax_job *job, ptrdiff_t first, ptrdiff_t n)
{
    rows->job = job;
    rows->first = first;
    V(take_rows)(rows, n);
    V(use_tiles)(rows);
    rows->some_plain = 0;
    rows->unwritten.n = rows->unwritten.done = rows->unwritten.done_in_class = 0;
    rows->unwritten.power = rows->unwritten.end = NULL;
    rows->unwritten.is_flat = 0;
}

INLINE V(ivector) V(load_bits)(const V(bits) *p) { return (V(ivector))V(load)((const V(real) *)p); }

INLINE V(vector) V(rounded)(V(vector) x) { return (x + V(all)(MAGIC)) - V(all)(MAGIC); }

/* What exponentials are relative to: a row's first logit, or 0 if that is extreme */
INLINE V(vector) V(first_exponent)(V(vector) first)
{
    V(mask) is_direct = V(greater)(V(all)(DIRECT), V(abs)(first));
    V(vector) k = V(rounded)(V(keep)(is_direct, first) * V(all)(LOG2E));
    return k - V(choose)(is_direct, V(all)(V(LANES_HEADROOM)), V(all)(2 * V(LANES_HEADROOM)));
}

/* 1 where sums relative to such an exponent are good: nothing too large or too small, and no NaN */
INLINE V(vector) V(is_summed)(V(vector) exponent, V(vector) largest, V(vector) seen)
{
    V(vector) above = V(fma)(largest, V(all)(LOG2E), -exponent);
    V(mask) is_high = V(greater)(above, V(all)(V(LANES_HEADROOM) - 2));
    V(mask) is_low = V(greater)(V(all)(V(LANES_MOST)), above);
    return V(keep)(is_high & is_low & V(equal)(seen, seen), V(all)(1));
}

/* Logits to come that are fetched meanwhile, a line for each class and line of lanes: from `at` on, from lane
 * `turn` on from `then`. What the first-level cache gets must be used soon, as classes of an image begin so
 * far apart that most share a set of it; the second-level cache gets the next sweep's, from `then` on. */
typedef struct {
    const V(real) *at, *then, *after_all;
    ptrdiff_t row_step, class_step, turn;
    ptrdiff_t skipped; /* reals: of short sweeps some more, so that what is far is far enough */
    int is_block;      /* a whole block's, for which the first-level cache has no room */
} V(fetch);

/* Of runs of `width` reals as many as are fetched far ahead */
INLINE ptrdiff_t V(runs_ahead)(ptrdiff_t width)
{
    return LANES_FETCHED_BYTES / (width * (ptrdiff_t)sizeof(V(real)));
}

/* Of logits in place: those AHEAD, and at the end of a sweep's lanes the first of the next sweep */
INLINE V(fetch)
    V(fetch_in_place)(const V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, const V(real) *after_all)
{
    ptrdiff_t ahead = rows->width < V(AHEAD) ? rows->width : V(AHEAD);
    ptrdiff_t runs = V(runs_ahead)(rows->width), skipped = runs > V(SWEEP) ? runs - V(SWEEP) : 0;
    return (V(fetch)){.at = x + ahead,
                      .then = x,
                      .after_all = after_all,
                      .row_step = 1,
                      .class_step = x_stride,
                      .turn = (rows->width - ahead) & -(ptrdiff_t)V(LINE),
                      .skipped = skipped * x_stride};
}

/* A whole block's that is to come: line after line of it for each class and line of lanes */
INLINE V(fetch) V(fetch_block)(const V(real) *next_block, ptrdiff_t row_step, ptrdiff_t class_step)
{
    return (V(fetch)){.at = next_block,
                      .then = next_block,
                      .after_all = next_block,
                      .row_step = row_step,
                      .class_step = class_step,
                      .turn = -1,
                      .is_block = 1};
}

/* Of logits that are brought into the tile: as they lie */
INLINE V(fetch) V(fetch_in_rows)(const V(real) *next_block, ptrdiff_t n_classes)
{
    return V(fetch_block)(next_block, n_classes, V(LINE));
}

INLINE void V(fetch_before_sweep)(V(fetch) *next, ptrdiff_t n_classes, ptrdiff_t n_left)
{
    next->then = n_classes == n_left ? next->after_all : next->then + n_classes * next->class_step;
}

INLINE void V(fetch_classes)(V(fetch) *next, ptrdiff_t lane, int n_classes)
{
    if (lane % V(LINE) != 0)
        return;
    if (lane == next->turn)
        next->at = next->then;
#pragma GCC unroll 8
    for (int c = 0; c < n_classes; c++) {
        const V(real) *near = next->at + c * next->class_step;
        const V(real) *far = next->then + lane + c * next->class_step + next->skipped;
        if (next->is_block) {
            __builtin_prefetch(near, 0, 2);
        } else {
            __builtin_prefetch(near, 0, 3);
            __builtin_prefetch(far, 0, 2);
        }
    }
    next->at += next->row_step * V(LINE);
}

typedef struct {
    V(vector) largest, peak, chain, seen, target;
} V(running);

/* Set rows up for sums: exponentials relative to `first`, the rows' first logits. */
static void V(start_sums)(V(lanes) *rows, const V(real) *first)
{
    V(vector) zero = V(all)(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(vector) exponent = V(first_exponent)(V(load)(first + lane));
        rows->exp_scale[lane / V(LANES)] = V(exp_scale_of)(exponent);
        V(store)(rows->exponent + lane, exponent);
        V(store)(rows->shift + lane, zero);
        V(store)(rows->largest + lane, V(all)(-INFINITY));
        V(store)(rows->peak + lane, zero);
        V(store)(rows->sum + lane, zero);
        V(store)(rows->sum_lost + lane, zero);
        V(store)(rows->seen + lane, zero);
        V(store)(rows->target_logit + lane, zero);
    }
}

/* Add classes from first_class on to the sums, and find the logits of their labels. The exponentials go to
 * `e`, if not NULL; it may be x. Meanwhile logits to come are fetched. (What precedes and follows the
 * exponentials stands in loops of its own: a turn of this one fills all that a processor looks ahead.) */
INLINE void V(sum_some)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, V(real) *e, ptrdiff_t e_stride,
                        int n_classes, ptrdiff_t first_class, V(fetch) next)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(running) run = {V(load)(rows->largest + lane), V(load)(rows->peak + lane), V(all)(0),
                          V(load)(rows->seen + lane), V(load)(rows->target_logit + lane)};
        V(ivector) label = V(load_bits)(rows->label + lane) - (V(bits))first_class;
        V(exp_scale) scale = rows->exp_scale[lane / V(LANES)];
        V(vector) power[V(SWEEP)];
        V(fetch_classes)(&next, lane, n_classes);
        /* Of an exponential and the largest so far, the smaller joins the others. */
#pragma GCC unroll 8
        for (int c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride);
            run.target += V(keep)(V(equal_bits)(label, V(all_bits)((V(bits))c)), logit);
            run.seen += logit;
            run.largest = V(max)(logit, run.largest);
            power[c] = V(exp_fine)(logit, scale);
            if (e)
                V(store)(e + c * e_stride + lane, power[c]);
        }
#pragma GCC unroll 8
        for (int c = 0; c < n_classes; c++) {
            run.chain += V(min)(run.peak, power[c]);
            run.peak = V(max)(power[c], run.peak);
        }
        V(store)(rows->largest + lane, run.largest);
        V(store)(rows->peak + lane, run.peak);
        V(store)(rows->seen + lane, run.seen);
        V(store)(rows->target_logit + lane, run.target);
        V(long_sum) total = {run.chain, V(load)(rows->sum + lane), V(load)(rows->sum_lost + lane)};
        V(fold)(&total);
        V(store)(rows->sum + lane, total.sum);
        V(store)(rows->sum_lost + lane, total.lost);
    }
}

/* Of the classes left as many as the next sweep takes: sweeps are as equal as can be. */
INLINE ptrdiff_t V(classes_of_sweep)(ptrdiff_t left)
{
    ptrdiff_t n_sweeps = (left + V(SWEEP) - 1) / V(SWEEP);
    return (left + n_sweeps - 1) / n_sweeps;
}

static void V(sum_classes)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, V(real) *e,
                           ptrdiff_t e_stride, ptrdiff_t n_classes, ptrdiff_t first_class, V(fetch) next)
{
#define SUM_SOME(n)                                                            \
    case n:                                                                    \
        if (e)                                                                 \
            V(sum_some)(rows, x, x_stride, e, e_stride, n, first_class, next); \
        else                                                                   \
            V(sum_some)(rows, x, x_stride, NULL, 0, n, first_class, next);     \
        break
    for (ptrdiff_t left = n_classes, n; left > 0; left -= n) {
        n = V(classes_of_sweep)(left);
        V(fetch_before_sweep)(&next, n, left);
        switch (n) {
            SUM_SOME(1);
            SUM_SOME(2);
            SUM_SOME(3);
            SUM_SOME(4);
            SUM_SOME(5);
            SUM_SOME(6);
            SUM_SOME(7);
            SUM_SOME(8);
        }
        x += n * x_stride;
        e = e ? e + n * e_stride : NULL;
        first_class += n;
        next.at += n * next.class_step;
    }
#undef SUM_SOME
}

/* Are they all summed? */
static int V(are_summed)(V(lanes) *rows)
{
    V(vector) fewest = V(all)(1);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(vector) is_summed = V(is_summed)(V(load)(rows->exponent + lane), V(load)(rows->largest + lane),
                                           V(load)(rows->seen + lane));
        if (rows->some_plain)
            is_summed = V(max)(is_summed, V(load)(rows->is_plain + lane));
        fewest = V(min)(fewest, is_summed);
        V(store)(rows->is_summed + lane, is_summed);
    }
    return !V(any)(V(equal)(fewest, V(all)(0)));
}

/* The largest logit and its class, first of equals */
static void V(find_tops)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                         ptrdiff_t first_class)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(ivector) top = first_class ? V(load_bits)(rows->top + lane) : V(all_bits)(0);
        V(vector) largest = first_class ? V(load)(rows->largest + lane) : V(all)(-INFINITY);
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride);
            V(mask) larger = V(greater)(logit, largest);
            largest = V(choose)(larger, logit, largest);
            top = V(choose_bits)(larger, V(all_bits)((V(bits))(first_class + c)), top);
        }
        V(store)(rows->largest + lane, largest);
        V(store)((V(real) *)(rows->top + lane), (V(vector))top);
    }
}

/* What sum_classes leaves out, in rows whose top is known: sums of the rows that are not summed yet,
 * relative to the largest logit, and of gamma, if that is not NULL, by class (gamma_stride 0) or by lane. */
INLINE void V(sum_again)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, V(real) *e, ptrdiff_t e_stride,
                         const V(real) *gamma, ptrdiff_t gamma_stride, ptrdiff_t n_classes,
                         ptrdiff_t first_class)
{
    V(vector) zero = V(all)(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(vector) largest = V(load)(rows->largest + lane), size = V(abs)(largest);
        V(mask) is_summed = V(nonzero)(V(load)(rows->is_summed + lane));
        V(mask) is_finite = V(greater)(V(all)(INFINITY), size);
        V(vector) reference = V(keep)(is_finite, largest);
        V(vector) direct = V(choose)(V(greater)(size, V(all)(DIRECT)), zero, reference);
        V(vector) shift = V(choose)(is_summed, zero, reference - direct);
        V(vector) k = V(rounded)(direct * V(all)(LOG2E)) - V(all)(V(LANES_HEADROOM));
        k = V(choose)(is_summed, V(load)(rows->exponent + lane), k);
        V(exp_scale) scale = V(exp_scale_of)(k);
        V(ivector) top = V(load_bits)(rows->top + lane);
        V(ivector) label = V(load_bits)(rows->label + lane);
        V(vector) peak = V(load)(rows->peak + lane), target = V(load)(rows->target_logit + lane);
        V(vector) top_weight = V(load)(rows->top_weight + lane);
        V(long_sum) sum = {zero, V(load)(rows->sum + lane), V(load)(rows->sum_lost + lane)};
        V(long_sum) weight = {zero, V(load)(rows->weight + lane), V(load)(rows->weight_lost + lane)};
        V(long_sum) gap = {zero, V(load)(rows->gap + lane), V(load)(rows->gap_lost + lane)};
        if (first_class == 0) {
            weight = gap = (V(long_sum)){zero, zero, zero};
            sum.sum = V(keep)(is_summed, sum.sum);
            sum.lost = V(keep)(is_summed, sum.lost);
            target = zero;
        }
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride), power = V(exp_fine)(logit - shift, scale);
            V(mask) is_top = V(equal_bits)(top, V(all_bits)((V(bits))(first_class + c)));
            V(mask) is_number = V(equal)(logit, logit);
            power = V(choose)(is_number, V(keep)(is_finite, power), logit);
            V(add_term)(&sum, V(choose)(is_summed, zero, V(choose)(is_top & is_number, zero, power)), c);
            peak = V(choose)(is_summed, peak, V(choose)(is_top, power, peak));
            target += V(keep)(V(equal_bits)(label, V(all_bits)((V(bits))(first_class + c))), logit);
            if (gamma) {
                V(vector) g = gamma_stride ? V(load)(gamma + c * gamma_stride + lane) : V(all)(gamma[c]);
                V(add_term)(&weight, V(choose)(is_top, zero, g), c);
                V(add_term)(&gap, V(keep)(V(nonzero)(g), g * (reference - logit)), c);
                top_weight = V(choose)(is_top, g, top_weight);
            }
            if (e)
                V(store)(e + c * e_stride + lane, power);
        }
        V(fold)(&sum);
        V(fold)(&weight);
        V(fold)(&gap);
        V(store)(rows->sum + lane, sum.sum);
        V(store)(rows->sum_lost + lane, sum.lost);
        V(store)(rows->weight + lane, weight.sum);
        V(store)(rows->weight_lost + lane, weight.lost);
        V(store)(rows->gap + lane, gap.sum);
        V(store)(rows->gap_lost + lane, gap.lost);
        V(store)(rows->top_weight + lane, top_weight);
        V(store)(rows->peak + lane, peak);
        V(store)(rows->target_logit + lane, target);
        V(store)(rows->shift + lane, shift);
        V(store)(rows->exponent + lane, k);
    }
}
#undef V
