/* Few rows side by side that threads share by class, in one real type; included once for each type.
 *
 * Were the rows shared out, each thread's share of a class would be a few lines far from the next. So a part
 * is a range of classes of all rows. Exponentials are relative to the rows' first logits in every part, so
 * the parts' sums add up as they are; the rows are finished in one block (lanes_block.h), and what that
 * leaves of them is what the parts' second pass needs.
 */
#define V(name) PASTE(REAL, name)

/* What a part knows of the rows: of sums of exponentials as in V(lanes) */
typedef struct {
    V(real) largest[V(LANES_STRIDE)], peak[V(LANES_STRIDE)], seen[V(LANES_STRIDE)]; /* not aligned */
    V(real) sum[V(LANES_STRIDE)], sum_lost[V(LANES_STRIDE)], target_logit[V(LANES_STRIDE)];
} V(lanes_part);

_Static_assert(sizeof(V(lanes_part)) <= LANES_PART_REALS * sizeof(V(real)), "parts are too large");
_Static_assert(offsetof(V(lanes), tile) <= LANES_STATE_REALS * sizeof(V(real)), "rows are too large");

INLINE V(lanes_part) *V(lanes_part_of)(const softmax_job *job, ptrdiff_t part)
{
    return (V(lanes_part) *)((char *)job->parts + part * LANES_PART_REALS * (ptrdiff_t)sizeof(V(real)));
}

/* Behind the parts: the finished rows */
INLINE void *V(finished_lanes)(const softmax_job *job)
{
    return V(lanes_part_of)(job, (job->n_classes + job->part_classes - 1) / job->part_classes);
}

static void V(leave_part)(const V(lanes) *rows, ptrdiff_t number)
{
    V(lanes_part) *part = V(lanes_part_of)(rows->job, number);
    const size_t size = sizeof(V(real)) * (size_t)rows->width;
    memcpy(part->largest, rows->largest, size);
    memcpy(part->peak, rows->peak, size);
    memcpy(part->seen, rows->seen, size);
    memcpy(part->sum, rows->sum, size);
    memcpy(part->sum_lost, rows->sum_lost, size);
    memcpy(part->target_logit, rows->target_logit, size);
}

/* The rows' sums from all parts', in order */
static void V(merge_parts)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    ptrdiff_t stride;
    V(start_sums)(rows, V(lanes_of)(rows, &job->logits, 0, 1, rows->x_tile, &stride));
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES)) {
        V(running) run = {V(load)(rows->largest + lane), V(all)(0), V(all)(0), V(all)(0), V(all)(0)};
        V(long_sum) sum = {V(all)(0), V(all)(0), V(all)(0)};
        for (ptrdiff_t c = 0; c < job->n_classes; c += job->part_classes) {
            const V(lanes_part) *part = V(lanes_part_of)(job, c / job->part_classes);
            V(vector) peak = V(load)(part->peak + lane);
            run.largest = V(max)(V(load)(part->largest + lane), run.largest);
            run.seen += V(load)(part->seen + lane);
            run.target += V(load)(part->target_logit + lane);
            sum.chain = V(load)(part->sum + lane);
            V(fold)(&sum);
            sum.chain = V(min)(run.peak, peak);
            V(fold)(&sum);
            sum.lost += V(load)(part->sum_lost + lane);
            run.peak = V(max)(peak, run.peak);
        }
        V(store)(rows->largest + lane, run.largest);
        V(store)(rows->peak + lane, run.peak);
        V(store)(rows->seen + lane, run.seen);
        V(store)(rows->target_logit + lane, run.target);
        V(store)(rows->sum + lane, sum.sum);
        V(store)(rows->sum_lost + lane, sum.lost);
    }
}

#undef V
