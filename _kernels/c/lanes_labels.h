/* The common loss of rows side by side, in one real type: labels, and no coefficients by class but the
 * label's own; included once for each type.
 *
 * A row's loss is log1p(others/own): `own` is the exponential of its label's logit, `others` the sum of the
 * rest, relative to the row's first logit. So neither its largest logit is sought nor its label's, and where
 * the label is far ahead the loss keeps its relative precision. Rows whose exponentials leave the range where
 * that holds (or hold NaN) go the general way (lanes_block.h).
 */
#define V(name) PASTE(REAL, name)

INLINE V(vector) PASTE(V(take), REAL)(const V(real) *p) { return V(load)(p); }
INLINE void PASTE(V(give), REAL)(V(real) *p, V(vector) v) { V(store)(p, v); }
#ifndef REAL_IS_F64
/* As many rows as a vector of doubles has lanes */
typedef float f32_unaligned_half
    __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(float)), may_alias));
INLINE f64_vector f32_take_f64(const float *p)
{
    f32_half_vector half = *(const f32_unaligned_half *)p;
    return f32_widened(half);
}
INLINE void f32_give_f64(float *p, f64_vector v) { *(f32_unaligned_half *)p = f32_narrowed(v); }
#endif

/* The lanes as doubles, in pairs or fours if they are more */
INLINE f64_vector V(halves_sum)(V(vector) v)
{
    V(real) ALIGNED lane[V(LANES)];
    V(store)(lane, v);
    f64_vector sum = PASTE(V(take), f64)(lane);
    for (int i = f64_LANES; i < V(LANES); i += f64_LANES)
        sum += PASTE(V(take), f64)(lane + i);
    return sum;
}

static int V(has_plain_labels)(const softmax_job *job)
{
    return job->target_kind == LABELS && !job->gamma && job->z_loss == 0 && !job->lse_in.data &&
           !job->lse.data && !job->figures && job->n_classes <= LANES_PLAIN_CLASSES;
}

/* What the rows' exponentials are relative to */
static void V(scale_rows)(V(lanes) *rows, const V(real) *first)
{
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES))
        rows->exp_scale[lane / V(LANES)] = V(exp_scale_of)(V(first_exponent)(V(load)(first + lane)));
}

/* A class's exponential to `own` where it is the label's, elsewhere it stays among the others'; those of an
 * odd number join the ones before. Said by which label it is not, AVX-512 takes an operation for each. */
INLINE void V(take_class)(V(vector) *power, int c, V(ivector) label, V(vector) *own)
{
#ifdef VECTOR_AVX512
    V(mask) is_other = V(differ_bits)(label, V(all_bits)((V(bits))c));
    *own = V(choose)(is_other, *own, power[c]);
    if (c % 2)
        power[c - 1] = V(add_kept)(is_other, power[c - 1], power[c]);
    else
        power[c] = V(keep)(is_other, power[c]);
#else
    V(mask) is_label = V(equal_bits)(label, V(all_bits)((V(bits))c));
    *own = V(choose)(is_label, power[c], *own);
    power[c] = V(drop)(is_label, power[c]);
    if (c % 2)
        power[c - 1] += power[c];
#endif
}

/* Add classes from first_class on to others (`sum`) and own (`peak`); `labels` of the next rows are fetched
 * meanwhile. */
INLINE void V(label_sums)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, powers_are powers,
                          int n_classes, ptrdiff_t first_class, const char *labels, V(fetch) next)
{
    const int keeps_lost = powers != SUMMED && rows->job->n_classes > V(LABELS_FEW);
    const ptrdiff_t e_stride = V(tile_stride)(rows);
    V(real) *e = rows->x_tile + first_class * e_stride;
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES), x += V(LANES)) {
        V(exp_scale) scale = rows->exp_scale[lane / V(LANES)];
        V(ivector) label = V(load_bits)(rows->label + lane) - (V(bits))first_class;
        V(ivector) is_lost = V(all_bits)(0);
        V(vector) own = V(all)(0);
        V(vector) power[V(SWEEP)];
        V(fetch_labels)(rows, labels, lane);
        if (powers != GIVEN && next.at)
            V(fetch_classes)(&next, lane, n_classes);
        if (powers == KEPT && rows->unwritten.n && lane % V(LINE) == 0)
            V(write_class_lines)(&rows->unwritten, n_classes);
#pragma GCC unroll 8
        for (int c = 0; c < n_classes; c++)
            power[c] = V(load)(x + c * x_stride);
        if (powers != GIVEN)
            V(exps_fine)(power, n_classes, &scale, 0, &is_lost);
#pragma GCC unroll 8
        for (int c = 0; c < n_classes; c++) {
            if (powers == KEPT)
                V(store)(e + c * e_stride + lane, power[c]);
            V(take_class)(power, c, label, &own);
        }
#pragma GCC unroll 4
        for (int step = 2; step < n_classes; step *= 2)
#pragma GCC unroll 8
            for (int c = 0; c + step < n_classes; c += 2 * step)
                power[c] += power[c + step];
        V(vector) chain = (V(vector))((V(ivector))power[0] | is_lost);
        V(long_sum) others = {chain, chain, V(all)(0)};
        if (first_class > 0) {
            own += V(load)(rows->peak + lane);
            others.sum = V(load)(rows->sum + lane);
            others.lost = V(load)(rows->sum_lost + lane);
            if (keeps_lost)
                V(fold)(&others);
            else
                others.sum += chain;
        }
        V(store)(rows->peak + lane, own);
        V(store)(rows->sum + lane, others.sum);
        if (keeps_lost)
            V(store)(rows->sum_lost + lane, others.lost);
    }
}

static void V(sum_labels)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, powers_are powers,
                          V(fetch) next)
{
#define LABEL_SUMS(n)                                                               \
    case n:                                                                         \
        if (powers == GIVEN)                                                        \
            V(label_sums)(rows, x, x_stride, GIVEN, n, first_class, labels, next);  \
        else if (powers == KEPT)                                                    \
            V(label_sums)(rows, x, x_stride, KEPT, n, first_class, labels, next);   \
        else                                                                        \
            V(label_sums)(rows, x, x_stride, SUMMED, n, first_class, labels, next); \
        break
    ptrdiff_t first_class = 0;
    for (ptrdiff_t left = rows->job->n_classes, n; left > 0; left -= n) {
        n = V(classes_of_sweep)(left);
        V(fetch_before_sweep)(&next, n, left);
        const char *labels = n == left ? rows->labels_ahead : NULL;
        switch (n) {
            LABEL_SUMS(1);
            LABEL_SUMS(2);
            LABEL_SUMS(3);
            LABEL_SUMS(4);
            LABEL_SUMS(5);
            LABEL_SUMS(6);
            LABEL_SUMS(7);
            LABEL_SUMS(8);
        }
        x += n * x_stride;
        first_class += n;
        next.at += n * next.class_step;
    }
#undef LABEL_SUMS
}

/* Where the exponentials say all: nothing too large or too small, and no NaN */
INLINE V(mask) V(is_in_range)(V(vector) own, V(vector) whole)
{
    const V(real) most = sizeof(V(real)) == 8 ? (V(real))0x1p400 : (V(real))0x1p80;
    const V(real) least = sizeof(V(real)) == 8 ? (V(real))0x1p-400 : (V(real))0x1p-40;
    return V(greater)(V(all)(most), whole) & V(greater)(own, V(all)(least)) &
           V(greater)(whole, V(all)((V(real))((int64_t)1 << (V(LANES_HEADROOM) - 2))));
}

/* others/own of every row to `loss`, and what the gradient needs; returns 0 if a row is out of range. */
INLINE int V(label_ratios)(V(lanes) *rows, int is_weighted, int gradient)
{
    V(vector) worst = V(all)(1);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(vector) others = V(load)(rows->sum + lane), own = V(load)(rows->peak + lane);
        V(vector) whole = own + others;
        V(mask) live = V(nonzero)(V(load)(rows->live + lane));
        own = V(choose)(live, own, whole);
        V(vector) is_plain = V(keep)(V(is_in_range)(own, whole), V(all)(1));
        V(store)(rows->is_plain + lane, is_plain);
        worst = V(min)(worst, is_plain);
        V(store)(rows->loss + lane, V(keep)(live, others / own));
        if (gradient) {
            V(vector) scale = V(load)(rows->scale + lane), inverse = V(all)(1) / whole;
            V(vector) factor = scale * inverse, rest = V(fma)(-factor, whole, scale);
            if (rows->job->n_classes > V(LABELS_FEW)) {
                V(long_sum) exact = {own, others, V(load)(rows->sum_lost + lane)};
                V(fold)(&exact);
                rest -= factor * exact.lost;
            }
            factor = V(fma)(rest, inverse, factor);
            if (is_weighted)
                factor *= V(load)(rows->beta + lane);
            factor = V(keep)(live, factor);
            V(store)(rows->factor + lane, factor);
            V(store)(rows->label_entry + lane, -(others * factor));
        }
    }
    return !V(any)(V(equal)(worst, V(all)(0)));
}

/* Those as losses; returns their sum. */
INLINE double V(label_losses)(V(lanes) *rows, int is_weighted)
{
    f64_vector total = f64_all(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(vector) loss = V(log1p_nonnegative)(V(load)(rows->loss + lane));
        if (is_weighted)
            loss *= V(load)(rows->beta + lane);
        V(store)(rows->loss + lane, loss);
        total += V(halves_sum)(loss);
    }
    return f64_lanes_sum(total);
}

/* (1 + a)*(1 + b) - 1 */
INLINE V(vector) V(joined_odds)(V(vector) a, V(vector) b) { return V(fma)(a, b, a + b); }

/* The losses' sum alone, a logarithm for four rows; where that would leave the range it takes the losses. */
static double V(label_total)(V(lanes) *rows)
{
    const V(real) most = sizeof(V(real)) == 8 ? (V(real))0x1p200 : (V(real))0x1p28;
    f64_vector total = f64_all(0);
    V(vector) largest = V(all)(0), zero = V(all)(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += 4 * V(LANES)) {
        V(vector) ratio[4];
        for (int i = 0; i < 4; i++) {
            ratio[i] = lane + i * V(LANES) < rows->width ? V(load)(rows->loss + lane + i * V(LANES)) : zero;
            largest = V(max)(ratio[i], largest);
        }
        V(vector) all =
            V(joined_odds)(V(joined_odds)(ratio[0], ratio[1]), V(joined_odds)(ratio[2], ratio[3]));
        total += V(halves_sum)(V(log1p_nonnegative)(all));
    }
    return V(any)(V(greater)(largest, V(all)(most))) ? V(label_losses)(rows, 0) : f64_lanes_sum(total);
}

/* Some rows are out of range: keep what was found for the others, whose result must not depend on them. */
static void V(keep_plain)(V(lanes) *rows)
{
    size_t size = sizeof(V(real)) * (size_t)rows->width;
    memcpy(rows->plain_loss, rows->loss, size);
    memcpy(rows->plain_factor, rows->factor, size);
    memcpy(rows->plain_entry, rows->label_entry, size);
    rows->some_plain = 1;
}

/* And put it back; returns the sum of all losses. */
static double V(restore_plain)(V(lanes) *rows)
{
    double total = 0;
    for (ptrdiff_t i = 0; i < rows->n; i++) {
        if (rows->is_plain[i] != 0) {
            rows->loss[i] = rows->plain_loss[i];
            rows->factor[i] = rows->plain_factor[i];
            rows->label_entry[i] = rows->plain_entry[i];
        }
        total += rows->loss[i];
    }
    return total;
}

/* The losses of rows whose sums are known; returns 0 if a row is out of range. */
static int V(plain_losses)(V(lanes) *rows, int powers, double *total)
{
    const softmax_job *job = rows->job;
    if (job->beta) {
        int is_plain = V(label_ratios)(rows, 1, powers);
        *total = V(label_losses)(rows, 1);
        return is_plain;
    }
    int is_plain = powers ? V(label_ratios)(rows, 0, 1) : V(label_ratios)(rows, 0, 0);
    *total = is_plain && !job->loss.data ? V(label_total)(rows) : V(label_losses)(rows, 0);
    return is_plain;
}

/* Losses, and gradients left to be written or, where they are no reals side by side, exponentials in x_tile;
 * returns 0 if a row is out of range. */
static int V(plain_labels)(V(lanes) *rows, int powers, double *total)
{
    const softmax_job *job = rows->job;
    const V(real) *following = (const V(real) *)V(place)(&job->logits, rows->first + rows->n, 0);
    ptrdiff_t x_stride = V(tile_stride)(rows);
    V(unwritten) *left = &rows->unwritten;
    V(real) *flat = NULL;
    int is_flat = CAN_SPREAD && job->second_pass == GRADIENT && V(are_flat)(rows, &job->logits) &&
                  V(are_flat)(rows, &job->out);
    if (left->is_flat != is_flat || (!is_flat && left->n != rows->n))
        V(write_rest)(rows); /* which these rows' sums do not go along with */
    if (is_flat) {
        flat = rows->gamma_tile + V(LINE);
        flat += left->power == flat ? V(FLAT_TILE) : 0;
        V(flat_powers)(rows, (const V(real) *)V(place)(&job->logits, rows->first, 0), following, flat);
        V(rows_to_lanes)(flat, job->n_classes, rows->width, job->n_classes, rows->x_tile, x_stride);
        V(sum_labels)(rows, rows->x_tile, x_stride, GIVEN, (V(fetch)){0});
    } else {
        const V(real) *x = V(lanes_of)(rows, &job->logits, 0, job->n_classes, rows->x_tile, &x_stride);
        V(scale_rows)(rows, x);
        V(fetch) next = {0};
        if (x != rows->x_tile)
            next = V(fetch_in_place)(rows, x, x_stride, following);
        else if (!V(has_runs)(&job->logits))
            next = V(fetch_in_rows)(following, job->n_classes);
        V(sum_labels)(rows, x, x_stride, powers ? KEPT : SUMMED, next);
    }
    V(write_rest)(rows);
    int is_plain = V(plain_losses)(rows, powers, total);
    int is_wide = rows->n >= V(LINE); /* of fewer, side by side, a class may end before a line begins */
    if (is_plain && (flat || (powers && job->streams && is_wide && V(are_beside)(rows, &job->out))))
        V(leave_gradients)(rows, flat);
    return is_plain;
}
#undef V
