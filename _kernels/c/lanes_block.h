/* A block of rows of the softmax family, a row in each lane: for short rows, and for rows that lie side by
 * side while their classes lie far apart (`axis=1` of images); included once for each real type.
 *
 * Logits side by side are read in place, any others are brought into a tile, class-major. Where all classes
 * of the block fit the tile, the exponentials stay there for the second pass, which then only multiplies.
 */
#define V(name) PASTE(REAL, name)

#ifndef REAL_IS_F64
#define WIDE f32
#include "lanes_finish.h"
#undef WIDE
#endif
#define WIDE f64
#include "lanes_finish.h"
#undef WIDE

/* Add the classes from first_class to `end` to rows' sums; to `e` their exponentials, if it is not NULL. */
static void V(sum_range)(V(lanes) *rows, V(real) *e, ptrdiff_t first_class, ptrdiff_t end)
{
    const softmax_job *job = rows->job;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), x_stride, stride = V(tile_stride)(rows);
    for (ptrdiff_t c = first_class, n; c < end; c += n) {
        n = end - c < in_tile ? end - c : in_tile;
        const V(real) *x = V(lanes_of)(rows, &job->logits, c, n, rows->x_tile, &x_stride);
        if (c == 0)
            V(start_sums)(rows, x);
        const V(real) *following = (const V(real) *)V(place)(&job->logits, rows->first + rows->n, 0);
        int is_last = c + n == end && !job->part_classes;
        V(fetch) next = V(fetch_in_place)(rows, x, x_stride, is_last ? following : x + n * x_stride);
        if (x == rows->x_tile && V(is_real)(&job->logits) && job->logits.class_stride == job->logits.itemsize)
            next = V(fetch_in_rows)(following + V(LINE) *c, job->n_classes);
        V(sum_classes)(rows, x, x_stride, e, stride, n, c, next);
    }
}

/* Every row's sums; where `powers`, its exponentials are left in x_tile. */
static void V(find_sums)(V(lanes) *rows, int powers)
{
    const softmax_job *job = rows->job;
    int has_gamma = job->target_kind == PROBABILITIES || job->gamma_real;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), x_stride, stride = V(tile_stride)(rows);
    V(real) *e = powers ? rows->x_tile : NULL;
    int all_summed = 0;
    if (!has_gamma) {
        if (job->part_classes)
            V(merge_parts)(rows);
        else
            V(sum_range)(rows, e, 0, job->n_classes);
        all_summed = V(are_summed)(rows);
    }
    if (all_summed)
        return;
    if (has_gamma)
        memset(rows->is_summed, 0, sizeof rows->is_summed);
    for (ptrdiff_t c = 0, n; c < job->n_classes; c += n) {
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
INLINE V(vector)
    V(lanes_result)(const V(lanes) *rows, second_pass pass, int is_power, int all_live, V(vector) v,
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
    if (!gamma || rows->job->target_kind == LABELS)
        result = V(choose)(V(equal_bits)(V(load_bits)(rows->label + lane), number),
                           V(load)(rows->label_entry + lane), result);
    return all_live ? result : V(keep)(V(nonzero)(V(load)(rows->live + lane)), result);
}

/* Classes whose results lie without gaps: what two of them share a line is put together in `line` */
typedef struct {
    ptrdiff_t first, end;
    V(real) ALIGNED line[2 * V(LINE)];
} V(dense);

/* One class of all rows to `out`; streamed in whole lines, if at all, between what shares a line with other
 * rows. Of logits that are not in the cache those of later classes are fetched. */
INLINE void V(map_class)(const V(lanes) *rows, second_pass pass, int is_power, int all_live,
                         const V(real) *from, ptrdiff_t stride, const V(real) *gamma, ptrdiff_t gamma_stride,
                         V(real) *out, ptrdiff_t c, int streams, V(dense) *dense)
{
#define RESULT(lane) \
    V(lanes_result)(rows, pass, is_power, all_live, V(load)(from + (lane)), gamma, gamma_stride, lane, c)
    ptrdiff_t lane = 0, far = (2 + V(runs_ahead)(rows->width)) * stride;
    if (!streams) {
        for (; lane < rows->width; lane += V(LANES))
            V(store)(out + lane, RESULT(lane));
        return;
    }
    ptrdiff_t head = V(to_line)(out), before = V(LINE) - head;
    for (; lane < head; lane += V(LANES))
        V(store)(dense->line + before + lane, RESULT(lane));
    if (head > 0 && dense->first < c && c < dense->end)
        V(stream_run)(out - before, V(LINE), dense->line);
    else
        V(copy_few)(out, dense->line + before, head);
    for (lane = head; lane + V(LINE) <= rows->n; lane += V(LINE)) {
        if (!is_power) {
            __builtin_prefetch(from + lane + far, 0, 2);
            __builtin_prefetch(from + lane + 2 * stride, 0, 3);
        }
        for (int i = 0; i < V(LINE); i += V(LANES))
            V(stream)(out + lane + i, RESULT(lane + i));
    }
    ptrdiff_t left = rows->n - lane, last = rows->n - V(LINE);
    V(real) ALIGNED line[V(LINE)];
    for (int i = 0; i < V(LINE) &&left > 0; i += V(LANES))
        V(store)(line + i, RESULT(last + i));
    V(copy_few)(dense->first <= c && c + 1 < dense->end ? dense->line : out + lane, line + V(LINE) - left,
                left);
#undef RESULT
}

INLINE void V(map_classes_of)(const V(lanes) *rows, second_pass pass, int is_power, int all_live,
                              const V(real) *from, ptrdiff_t stride, const V(real) *gamma,
                              ptrdiff_t gamma_stride, V(real) *out, ptrdiff_t out_stride, ptrdiff_t n_classes,
                              ptrdiff_t first_class, int streams, V(dense) *dense)
{
    for (ptrdiff_t c = 0; c < n_classes; c++)
        V(map_class)(rows, pass, is_power, all_live, from + c * stride, stride,
                     gamma ? gamma + c * (gamma_stride ? gamma_stride : 1) : NULL, gamma_stride,
                     out + c * out_stride, first_class + c, streams, dense);
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
            V(add_term)(
                &sum,
                V(lanes_result)(rows, ENTROPY, 0, 1, V(load)(x + c * x_stride + lane), NULL, 0, lane, c), c);
        V(fold)(&sum);
        V(store)(rows->weight + lane, sum.sum);
        V(store)(rows->weight_lost + lane, sum.lost);
    }
}

/* Of the classes from first_class to `end`, from their exponentials in x_tile if `powers`, else the last few
 * first: the caches have what was summed last. */
static void V(second_pass_of)(V(lanes) *rows, int powers, ptrdiff_t first_class, ptrdiff_t end)
{
    const softmax_job *job = rows->job;
    second_pass pass = job->second_pass;
    int beside = V(are_beside)(rows, &job->out);
    int streams = job->streams && rows->n >= 64;
    ptrdiff_t in_tile = V(classes_in_tile)(rows), stride = V(tile_stride)(rows);
    int has_gaps = job->out.class_stride != rows->n * (ptrdiff_t)sizeof(V(real));
    V(dense) dense = {.first = first_class, .end = has_gaps ? first_class : end};
    int last_first = !powers && has_gaps && pass != ENTROPY;
    ptrdiff_t n_ranges = (end - first_class + in_tile - 1) / in_tile;
    for (ptrdiff_t k = 0; k < n_ranges; k++) {
        ptrdiff_t c = first_class + (last_first ? n_ranges - 1 - k : k) * in_tile;
        ptrdiff_t n = end - c < in_tile ? end - c : in_tile;
        ptrdiff_t x_stride = stride, gamma_stride = 0, out_stride = stride;
        const V(real) *x = rows->x_tile, *gamma = NULL;
        V(real) *out = rows->x_tile;
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
#define MAP(pass, powers, all_live, gamma, gamma_stride, streams)                                            \
    V(map_classes_of)(rows, pass, powers, all_live, x, x_stride, gamma, gamma_stride, out, out_stride, n, c, \
                      streams, &dense)
        int direct = beside && streams;
        if (pass == LOG_SOFTMAX)
            MAP(LOG_SOFTMAX, 0, 1, NULL, 0, direct);
        else if (pass == SOFTMAX && powers)
            MAP(SOFTMAX, 1, 1, NULL, 0, direct);
        else if (pass == SOFTMAX)
            MAP(SOFTMAX, 0, 1, NULL, 0, direct);
        else if (gamma)
            MAP(GRADIENT, powers, rows->all_live, gamma, gamma_stride, direct);
        else if (powers && rows->all_live && direct)
            MAP(GRADIENT, 1, 1, NULL, 0, 1);
        else if (powers)
            MAP(GRADIENT, 1, rows->all_live, NULL, 0, direct);
        else
            MAP(GRADIENT, 0, rows->all_live, NULL, 0, direct);
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

/* Rows that stand in `rows`, added to the result; returns 0 if a label is bad. */
static int V(lanes_some)(V(lanes) *rows, block_result *result)
{
    const softmax_job *job = rows->job;
    double total;
    ptrdiff_t counted = V(prepare)(rows);
    if (counted < 0) {
        int64_t labels[LANES_ROWS];
        rows_labels(job, rows->first, rows->n, labels, result);
        return 0;
    }
    rows->all_live = counted == rows->n;
    int fits = V(classes_in_tile)(rows) == job->n_classes;
    int powers = fits && (job->second_pass == GRADIENT || job->second_pass == SOFTMAX);
    int tries_plain = fits && V(has_plain_labels)(job);
    int is_plain = tries_plain && V(plain_labels)(rows, powers, &total);
    rows->some_plain = 0;
    if (!rows->unwritten.n)
        V(write_carried)(&rows->unwritten); /* none of these rows' follows it */
    if (!is_plain) {
        if (tries_plain)
            V(keep_plain)(rows);
        V(prepare_more)(rows);
        if (job->figures)
            V(find_figure_sums)(rows);
        else
            V(find_sums)(rows, powers);
#ifdef REAL_IS_F64
        total = f64_finish_lanes_f64(rows);
#else
        if (job->lse.data || job->lse_in.data || job->gamma || job->target_kind == PROBABILITIES ||
            job->z_loss != 0)
            total = f32_finish_lanes_f64(rows);
        else
            total = f32_finish_lanes_f32(rows);
#endif
        if (tries_plain)
            total = V(restore_plain)(rows);
    }
    result->counted += counted;
    result->total += total;
    if (job->loss.data)
        V(store_items)(&job->loss, rows->first, rows->n, rows->loss);
    if (job->lse.data)
        f64_store_items(&job->lse, rows->first, rows->n, rows->lse);
    if (job->figures)
        V(put_figures)(rows);
    if (job->part_classes) {
        memcpy(V(finished_lanes)(job), rows, offsetof(V(lanes), tile));
    } else if (job->second_pass != NOTHING && !rows->unwritten.n) {
        rows->all_live |= is_plain;
        V(second_pass_of)(rows, powers, 0, job->n_classes);
    }
    return 1;
}

static void V(lanes_block)(const softmax_job *job, ptrdiff_t number, block_result *result)
{
    V(lanes) rows;
    FRESH(rows);
    ptrdiff_t first = number * job->block_rows, left = job->n_rows - first;
    left = left < job->block_rows ? left : job->block_rows;
    V(begin_lanes)(&rows, job, first, 0);
    if (job->second_pass == GRADIENT && V(has_plain_labels)(job))
        V(place_rows)(rows.row_of, job->n_classes);
    for (; left > 0; rows.first += rows.n, left -= rows.n) {
        V(take_rows)(&rows, left < job->rows_at_once ? left : job->rows_at_once);
        if (!V(lanes_some)(&rows, result))
            return;
    }
    V(write_rest)(&rows);
    V(write_carried)(&rows.unwritten);
    fence();
}

/* A part's sums, or once the rows are finished its second pass */
static void V(lanes_part_block)(const softmax_job *job, ptrdiff_t number, int is_finished)
{
    V(lanes) rows;
    FRESH(rows);
    if (is_finished) /* the last first: the caches have what was summed last */
        number = (job->n_classes - 1) / job->part_classes - number;
    ptrdiff_t first = number * job->part_classes, end = first + job->part_classes, stride;
    end = end < job->n_classes ? end : job->n_classes;
    if (is_finished) {
        memcpy(&rows, V(finished_lanes)(job), offsetof(V(lanes), tile));
        V(use_tiles)(&rows);
        V(second_pass_of)(&rows, 0, first, end);
        return;
    }
    V(begin_lanes)(&rows, job, 0, job->n_rows);
    if (V(prepare)(&rows) < 0)
        return; /* the block that finishes the rows says so */
    V(start_sums)(&rows, V(lanes_of)(&rows, &job->logits, 0, 1, rows.x_tile, &stride));
    V(sum_range)(&rows, NULL, first, end);
    V(leave_part)(&rows, number);
}
#undef V
