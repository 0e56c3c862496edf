/* A block of rows of the softmax family, a row in each lane: for short rows, and for rows that lie side by
 * side while their classes lie far apart (`axis=1` of images); included once for each real type.
 *
 * Logits side by side are read in place, any others are brought into a tile, class-major. Where all classes
 * of the block fit the tile, the exponentials stay there for the second pass, which then only multiplies.
 */
#define V(name) PASTE(REAL, name)

INLINE V(vector) PASTE(V(take), REAL)(const V(real) *p) { return V(load)(p); }
INLINE void PASTE(V(give), REAL)(V(real) *p, V(vector) v) { V(store)(p, v); }
#ifndef REAL_IS_F64
/* As many rows as a vector of doubles has lanes */
typedef float f32_half_vector __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float f32_unaligned_half
    __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(float)), may_alias));
INLINE f64_vector f32_take_f64(const float *p)
{
    f32_half_vector half = *(const f32_unaligned_half *)p;
    return __builtin_convertvector(half, f64_vector);
}
INLINE void f32_give_f64(float *p, f64_vector v)
{
    *(f32_unaligned_half *)p = __builtin_convertvector(v, f32_half_vector);
}
#define WIDE f32
#include "lanes_finish.h"
#undef WIDE
#endif
#define WIDE f64
#include "lanes_finish.h"
#undef WIDE

/* Labels as lanes; -1 where a row is ignored. Is each in range, or ignored? */
#define LABELS_OF(type, clip)                                                      \
    for (ptrdiff_t i = 0; i < n; i++) {                                            \
        int64_t label = (int64_t)clip(*(const type *)(from + i * stride));         \
        int is_ignored = label == ignored, is_class = (uint64_t)label < n_classes; \
        to[i] = is_ignored ? -1 : (V(bits))label;                                  \
        bad |= !(is_ignored | is_class);                                           \
    }
#define LABELS_RUN(type, clip)                     \
    do {                                           \
        if (stride == (ptrdiff_t)sizeof(type)) {   \
            const ptrdiff_t stride = sizeof(type); \
            LABELS_OF(type, clip)                  \
        } else {                                   \
            LABELS_OF(type, clip)                  \
        }                                          \
    } while (0)
#define CLIPPED(label) ((label) > INT64_MAX ? INT64_MAX : (label))

static int V(labels_run)(const softmax_job *job, const char *from, ptrdiff_t stride, ptrdiff_t n, V(bits) *to)
{
    int64_t ignored = job->ignore_index;
    uint64_t n_classes = (uint64_t)job->n_classes;
    int bad = 0;
    switch (job->target.dtype) {
    case DTYPE_I8: LABELS_RUN(int8_t, ); break;
    case DTYPE_U8: LABELS_RUN(uint8_t, ); break;
    case DTYPE_I16: LABELS_RUN(int16_t, ); break;
    case DTYPE_U16: LABELS_RUN(uint16_t, ); break;
    case DTYPE_I32: LABELS_RUN(int32_t, ); break;
    case DTYPE_U32: LABELS_RUN(uint32_t, ); break;
    case DTYPE_I64: LABELS_RUN(int64_t, ); break;
    default: LABELS_RUN(uint64_t, CLIPPED);
    }
    return !bad;
}
#undef CLIPPED
#undef LABELS_RUN
#undef LABELS_OF

static int V(read_labels)(V(lanes) *rows)
{
    const array_view *target = &rows->job->target;
    int all_good = 1;
    for (ptrdiff_t done = 0, n; done < rows->n; done += n) {
        const char *from = target->data + view_offset(target, rows->first + done);
        n = V(run_length)(target, rows->first + done, rows->n - done);
        all_good &= V(labels_run)(rows->job, from, V(last_stride)(target), n, rows->label + done);
    }
    return all_good;
}

/* Numbers by row, `otherwise` where there are none */
static void V(read_numbers)(const V(lanes) *rows, const array_view *view, V(real) otherwise, V(real) *to)
{
    if (view->data && V(last_stride)(view) == 0 && V(run_length)(view, rows->first, rows->n) == rows->n)
        otherwise = (V(real))view_real(view, view->data + view_offset(view, rows->first));
    else if (view->data) {
        const V(real) *from = V(items)(view, rows->first, rows->n, to);
        if (from != to)
            memcpy(to, from, sizeof *to * (size_t)rows->n);
        return;
    }
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES))
        V(store)(to + lane, V(all)(otherwise));
}

/* What sums and finish need of labels; returns how many rows count. */
static ptrdiff_t V(prepare)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    ptrdiff_t counted = 0;
    for (ptrdiff_t i = rows->n; i < rows->width; i++)
        rows->label[i] = -1;
    if (job->target_kind == LABELS) {
        for (ptrdiff_t i = 0; i < rows->width; i++) {
            rows->live[i] = rows->label[i] >= 0;
            counted += rows->label[i] >= 0;
        }
        for (ptrdiff_t i = 0; i < rows->n && job->beta; i++)
            rows->beta[i] = rows->label[i] < 0 ? 0 : (V(real))job->beta[rows->label[i]];
        for (ptrdiff_t i = 0; i < rows->n && job->gamma; i++)
            rows->label_gamma[i] = rows->label[i] < 0 ? 0 : (V(real))job->gamma[rows->label[i]];
    } else {
        for (ptrdiff_t i = 0; i < rows->width; i++)
            rows->live[i] = i < rows->n;
        memset(rows->label, -1, sizeof *rows->label * (size_t)rows->width);
        counted = rows->n;
    }
    for (ptrdiff_t i = 0; i < rows->width && !job->beta; i++)
        rows->beta[i] = 1;
    V(read_numbers)(rows, &job->scale, 1, rows->scale);
    if (job->lse_in.data) {
        const double *lse = f64_items(&job->lse_in, rows->first, rows->n, rows->lse_in);
        if (lse != rows->lse_in)
            memcpy(rows->lse_in, lse, sizeof *lse * (size_t)rows->n);
    }
    return counted;
}

/* Do the block's rows lie side by side, as reals that fill whole vectors? */
INLINE int V(are_beside)(const V(lanes) *rows, const array_view *view)
{
    return V(is_real)(view) && V(last_stride)(view) == (ptrdiff_t)sizeof(V(real)) && rows->n == rows->width &&
           V(run_length)(view, rows->first, rows->n) == rows->n;
}

INLINE char *V(place)(const array_view *view, ptrdiff_t row, ptrdiff_t c)
{
    return view->data + view_offset(view, row) + c * view->class_stride;
}

INLINE ptrdiff_t V(tile_stride)(const V(lanes) *rows) { return rows->width + V(LINE); }

/* One run of rows with classes next to each other, in any dtype, to lanes or from them */
enum { V(NARROW) = 64 };
static void V(narrow_run)(const array_view *view, char *place, ptrdiff_t n, ptrdiff_t n_classes,
                          V(real) *lanes, ptrdiff_t lanes_stride, int stores)
{
    V(real) ALIGNED buffer[V(LANES) *V(NARROW)];
    ptrdiff_t stride = V(last_stride)(view), row_bytes = n_classes * view->itemsize, group;
    for (ptrdiff_t i = 0; i < n; i += group, lanes += group) {
        group = n - i < V(LANES) ? n - i : V(LANES);
        /* Rows without gaps are converted as one. */
        ptrdiff_t n_runs = stride == row_bytes ? 1 : group, run = group * n_classes / n_runs;
        if (stores)
            V(lanes_to_rows)(lanes, lanes_stride, group, n_classes, buffer, n_classes);
        for (ptrdiff_t j = 0; j < n_runs; j++) {
            char *at = place + (i + j) * stride;
            if (stores)
                V(store_run)(view->dtype, at, view->itemsize, run, buffer + j * n_classes);
            else
                V(load_run)(view->dtype, at, view->itemsize, run, buffer + j * n_classes);
        }
        if (!stores)
            V(rows_to_lanes)(buffer, n_classes, group, n_classes, lanes, lanes_stride);
    }
}

/* n_classes of the block's rows as lanes, *stride reals from class to class: in place or in `tile` */
static const V(real) *V(lanes_of)(const V(lanes) *rows, const array_view *view, ptrdiff_t first_class,
                                  ptrdiff_t n_classes, V(real) *tile, ptrdiff_t *stride)
{
    if (V(are_beside)(rows, view)) {
        *stride = view->class_stride / (ptrdiff_t)sizeof(V(real));
        return (const V(real) *)V(place)(view, rows->first, first_class);
    }
    *stride = V(tile_stride)(rows);
    for (ptrdiff_t done = 0, n; done < rows->n; done += n) {
        char *from = V(place)(view, rows->first + done, first_class);
        n = V(run_length)(view, rows->first + done, rows->n - done);
        if (view->class_stride == view->itemsize && V(is_real)(view))
            V(rows_to_lanes)((const V(real) *)from, V(last_stride)(view) / (ptrdiff_t)sizeof(V(real)), n,
                             n_classes, tile + done, *stride);
        else if (view->class_stride == view->itemsize && n_classes <= V(NARROW))
            V(narrow_run)(view, from, n, n_classes, tile + done, *stride, 0);
        else
            for (ptrdiff_t c = 0; c < n_classes; c++)
                V(load_run)(view->dtype, from + c * view->class_stride, V(last_stride)(view), n,
                            tile + c * *stride + done);
    }
    for (ptrdiff_t c = 0; c < n_classes; c++)
        for (ptrdiff_t i = rows->n; i < rows->width; i++)
            tile[c * *stride + i] = 0;
    return tile;
}

/* gamma of the same classes: by class (*stride 0), by lane, or NULL for zeros */
static const V(real) *V(gamma_of)(V(lanes) *rows, ptrdiff_t first_class, ptrdiff_t n_classes,
                                  ptrdiff_t *stride)
{
    const softmax_job *job = rows->job;
    const V(real) *weight = job->gamma_real ? (const V(real) *)job->gamma_real + first_class : NULL;
    *stride = 0;
    if (job->target_kind != PROBABILITIES)
        return weight;
    const V(real) *t = V(lanes_of)(rows, &job->target, first_class, n_classes, rows->gamma_tile, stride);
    if (!weight && job->target_scale == 1 && job->target_offset == 0)
        return t;
    V(real) target_scale = (V(real))job->target_scale, offset = (V(real))job->target_offset;
    ptrdiff_t to = V(tile_stride)(rows);
    for (ptrdiff_t c = 0; c < n_classes; c++)
        for (ptrdiff_t i = 0; i < rows->n; i++)
            rows->gamma_tile[c * to + i] =
                (weight ? weight[c] : 1) * (target_scale * t[c * *stride + i] + offset);
    *stride = to;
    return rows->gamma_tile;
}

/* How many classes a tile holds for all rows of the block, or all that there are */
static ptrdiff_t V(classes_in_tile)(const V(lanes) *rows)
{
    ptrdiff_t n = V(LANES_TILE) / V(tile_stride)(rows) / V(SWEEP) *V(SWEEP);
    return n < rows->job->n_classes ? n : rows->job->n_classes;
}

/* Every row's sums; where `powers`, its exponentials are left in x_tile. */
static void V(find_sums)(V(lanes) *rows, int powers)
{
    const softmax_job *job = rows->job;
    int has_gamma = job->target_kind == PROBABILITIES || job->gamma_real;
    int has_top = has_gamma || job->hit.data;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), x_stride, stride = V(tile_stride)(rows);
    V(real) *e = powers ? rows->x_tile : NULL;
    int all_summed = 0;
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        if (has_top)
            V(find_tops)(rows, x, x_stride, n, c);
        if (has_gamma)
            continue;
        if (c == 0)
            V(start_sums)(rows, x);
        if (x == rows->x_tile && V(is_real)(&job->logits) && job->logits.class_stride == job->logits.itemsize)
            rows->ahead = (const V(real) *)V(place)(&job->logits, rows->first, 0) + rows->n * job->n_classes;
        V(sum_classes)(rows, x, x_stride, e, stride, n, c);
        all_summed = c + n == job->n_classes && V(are_summed)(rows);
    }
    if (all_summed)
        return;
    if (has_gamma)
        memset(rows->is_summed, 0, sizeof rows->is_summed);
    for (ptrdiff_t c = 0, n; c < job->n_classes && !has_top; c += n) {
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        V(find_tops)(rows, x, x_stride, n, c);
    }
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        ptrdiff_t gamma_stride;
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        const V(real) *x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        const V(real) *gamma = V(gamma_of)(rows, c, n, &gamma_stride);
        if (gamma)
            V(sum_again)(rows, x, x_stride, e, stride, gamma, gamma_stride, n, c);
        else
            V(sum_again)(rows, x, x_stride, e, stride, NULL, 0, n, c);
    }
}

/* What becomes of one class of a vector of rows; `v` is its exponential (is_power) or its logit. */
INLINE V(vector) V(lanes_result)(const V(lanes) *rows, second_pass pass, int is_power, V(vector) v,
                                 const V(real) *gamma, ptrdiff_t gamma_stride, ptrdiff_t lane, ptrdiff_t c)
{
    V(vector) largest = V(load)(rows->largest + lane), log1p_others = V(load)(rows->log1p_others + lane);
    if (pass == LOG_SOFTMAX)
        return (v - largest) - log1p_others;
    V(vector) e = v;
    if (!is_power)
        e = V(exp_fine)(v - V(load)(rows->shift + lane), V(exp_scale_of)(V(load)(rows->exponent + lane)));
    if (pass == ENTROPY)
        return V(keep)(V(nonzero)(e), e * ((largest - v) + log1p_others));
    V(vector) result = e * V(load)(rows->factor + lane);
    if (pass == SOFTMAX)
        return result;
    V(ivector) number = V(all_bits)((V(bits))c);
    if (gamma) {
        V(vector) g = gamma_stride ? V(load)(gamma + lane) : V(all)(*gamma);
        result -= g * V(load)(rows->scale + lane);
        result = V(choose)(V(equal_bits)(V(load_bits)(rows->top + lane), number),
                           V(load)(rows->top_entry + lane), result);
    }
    if (rows->job->target_kind == LABELS)
        result = V(choose)(V(equal_bits)(V(load_bits)(rows->label + lane), number),
                           V(load)(rows->label_entry + lane), result);
    return rows->all_live ? result : V(keep)(V(nonzero)(V(load)(rows->live + lane)), result);
}

/* One class of all rows to `out`; streamed in whole lines, if at all, between what shares a line with other
 * rows. */
INLINE void V(map_class)(const V(lanes) *rows, second_pass pass, int is_power, const V(real) *from,
                         const V(real) *gamma, ptrdiff_t gamma_stride, V(real) *out, ptrdiff_t c, int streams)
{
#define RESULT(lane) \
    V(lanes_result)(rows, pass, is_power, V(load)(from + (lane)), gamma, gamma_stride, lane, c)
    ptrdiff_t lane = 0;
    if (!streams) {
        for (; lane < rows->width; lane += V(LANES))
            V(store)(out + lane, RESULT(lane));
        return;
    }
    ptrdiff_t head = V(to_line)(out);
    for (; lane < head; lane += V(LANES))
        V(store_some)(out + lane, RESULT(lane), 0, head - lane);
    for (lane = head; lane + V(LINE) <= rows->n; lane += V(LINE))
        for (int i = 0; i < V(LINE); i += V(LANES))
            V(stream)(out + lane + i, RESULT(lane + i));
    for (ptrdiff_t at; lane < rows->n; lane = at + V(LANES)) {
        at = lane < rows->n - V(LANES) ? lane : rows->n - V(LANES);
        V(store_some)(out + at, RESULT(at), lane - at, V(LANES));
    }
#undef RESULT
}

INLINE void V(map_classes_of)(const V(lanes) *rows, second_pass pass, int is_power, const V(real) *from,
                              ptrdiff_t stride, const V(real) *gamma, ptrdiff_t gamma_stride, V(real) *out,
                              ptrdiff_t out_stride, ptrdiff_t n_classes, ptrdiff_t first_class, int streams)
{
    for (ptrdiff_t c = 0; c < n_classes; c++)
        V(map_class)(rows, pass, is_power, from + c * stride,
                     gamma ? gamma + c * (gamma_stride ? gamma_stride : 1) : NULL, gamma_stride,
                     out + c * out_stride, first_class + c, streams);
}

static void V(add_entropies)(V(lanes) *rows, const V(real) *x, ptrdiff_t x_stride, ptrdiff_t n_classes,
                             ptrdiff_t first_class)
{
    V(vector) zero = V(all)(0);
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(long_sum) sum = {zero, V(load)(rows->weight + lane), V(load)(rows->weight_lost + lane)};
        if (first_class == 0)
            sum = (V(long_sum)){zero, zero, zero};
        for (ptrdiff_t c = 0; c < n_classes; c++)
            V(add_term)(&sum,
                        V(lanes_result)(rows, ENTROPY, 0, V(load)(x + c * x_stride + lane), NULL, 0, lane, c),
                        c);
        V(fold)(&sum);
        V(store)(rows->weight + lane, sum.sum);
        V(store)(rows->weight_lost + lane, sum.lost);
    }
}

/* n_classes of all rows from lanes in x_tile to where they belong */
static void V(put_lanes)(V(lanes) *rows, ptrdiff_t first_class, ptrdiff_t n_classes, int streams)
{
    const array_view *out = &rows->job->out;
    ptrdiff_t stride = V(tile_stride)(rows), row_stride = V(last_stride)(out) / (ptrdiff_t)sizeof(V(real));
    for (ptrdiff_t done = 0, n; done < rows->n; done += n) {
        char *to = V(place)(out, rows->first + done, first_class);
        const V(real) *lanes = rows->x_tile + done;
        n = V(run_length)(out, rows->first + done, rows->n - done);
        if (out->class_stride == out->itemsize && V(is_real)(out) && streams && row_stride == n_classes) {
            V(lanes_to_rows)(lanes, stride, n, n_classes, rows->gamma_tile, n_classes);
            V(stream_run)((V(real) *)to, n * n_classes, rows->gamma_tile);
        } else if (out->class_stride == out->itemsize && V(is_real)(out)) {
            V(lanes_to_rows)(lanes, stride, n, n_classes, (V(real) *)to, row_stride);
        } else if (out->class_stride == out->itemsize && n_classes <= V(NARROW)) {
            V(narrow_run)(out, to, n, n_classes, rows->x_tile + done, stride, 1);
        } else {
            for (ptrdiff_t c = 0; c < n_classes; c++)
                V(store_run)(out->dtype, to + c * out->class_stride, V(last_stride)(out), n,
                             lanes + c * stride);
        }
    }
}

static void V(second_pass_of)(V(lanes) *rows, int powers)
{
    const softmax_job *job = rows->job;
    second_pass pass = job->second_pass;
    int beside = V(are_beside)(rows, &job->out);
    int streams = job->streams && rows->n >= 64;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), stride = V(tile_stride)(rows);
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
        ptrdiff_t x_stride = stride, gamma_stride = 0, out_stride = stride;
        const V(real) *x = rows->x_tile, *gamma = NULL;
        V(real) *out = rows->x_tile;
        n = job->n_classes - c < in_tile ? job->n_classes - c : in_tile;
        if (!powers)
            x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        if (pass == ENTROPY) {
            V(add_entropies)(rows, x, x_stride, n, c);
            continue;
        }
        if (pass == GRADIENT)
            gamma = V(gamma_of)(rows, c, n, &gamma_stride);
        if (beside) {
            out = (V(real) *)V(place)(&job->out, rows->first, c);
            out_stride = job->out.class_stride / (ptrdiff_t)sizeof(V(real));
        }
#define MAP(pass, powers, gamma, gamma_stride, streams) \
    V(map_classes_of)(rows, pass, powers, x, x_stride, gamma, gamma_stride, out, out_stride, n, c, streams)
        int direct = beside && streams;
        if (pass == LOG_SOFTMAX)
            MAP(LOG_SOFTMAX, 0, NULL, 0, direct);
        else if (pass == SOFTMAX && powers)
            MAP(SOFTMAX, 1, NULL, 0, direct);
        else if (pass == SOFTMAX)
            MAP(SOFTMAX, 0, NULL, 0, direct);
        else if (gamma)
            MAP(GRADIENT, powers, gamma, gamma_stride, direct);
        else if (powers)
            MAP(GRADIENT, 1, NULL, 0, direct);
        else
            MAP(GRADIENT, 0, NULL, 0, direct);
#undef MAP
        if (!beside)
            V(put_lanes)(rows, c, n, streams);
    }
    if (pass == ENTROPY) {
        for (ptrdiff_t i = 0; i < rows->n; i++)
            rows->loss[i] = (rows->weight[i] + rows->weight_lost[i]) * rows->factor[i];
        V(store_items)(&job->out, rows->first, rows->n, rows->loss);
    }
    if (streams)
        fence();
}

static void V(lanes_block)(const softmax_job *job, ptrdiff_t number, block_result *result)
{
    V(lanes) rows;
    rows.job = job;
    rows.ahead = NULL;
    rows.first = number * job->block_rows;
    rows.n = job->n_rows - rows.first < job->block_rows ? job->n_rows - rows.first : job->block_rows;
    rows.width = (rows.n + V(LANES) - 1) / V(LANES) *V(LANES);
    if (job->target_kind == LABELS && !V(read_labels)(&rows)) {
        int64_t labels[LANES_ROWS];
        block_labels(job, number, labels, result);
        return;
    }
    result->counted = V(prepare)(&rows);
    rows.all_live = result->counted == rows.n;
    int fits = V(classes_in_tile)(&rows) == job->n_classes;
    int powers = fits && (job->second_pass == GRADIENT || job->second_pass == SOFTMAX);
    V(find_sums)(&rows, powers);
#ifdef REAL_IS_F64
    result->total = f64_finish_lanes_f64(&rows);
#else
    if (job->lse.data || job->lse_in.data || job->gamma || job->target_kind == PROBABILITIES ||
        job->z_loss != 0)
        result->total = f32_finish_lanes_f64(&rows);
    else
        result->total = f32_finish_lanes_f32(&rows);
#endif
    if (job->loss.data)
        V(store_items)(&job->loss, rows.first, rows.n, rows.loss);
    if (job->lse.data)
        f64_store_items(&job->lse, rows.first, rows.n, rows.lse);
    if (job->hit.data) {
        for (ptrdiff_t i = 0; i < rows.n; i++)
            rows.loss[i] = rows.live[i] != 0 && rows.label[i] == rows.top[i] && !isnan(rows.sum[i]);
        V(store_items)(&job->hit, rows.first, rows.n, rows.loss);
    }
    if (job->second_pass != NOTHING)
        V(second_pass_of)(&rows, powers);
}
#undef V
