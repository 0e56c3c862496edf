/* What needs no vectors: where items lie, single items of every dtype, labels, and which tables can run here.
 */
#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <math.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

ptrdiff_t view_offset(const array_view *view, ptrdiff_t index)
{
    ptrdiff_t offset = 0;
    for (int axis = view->ndim - 1; axis > 0; axis--) {
        offset += index % view->shape[axis] * view->stride[axis];
        index /= view->shape[axis];
    }
    return view->ndim ? offset + index * view->stride[0] : 0;
}

#define AS(type)                              \
    ({                                        \
        type value_;                          \
        memcpy(&value_, item, sizeof value_); \
        value_;                               \
    })

double view_real(const array_view *view, const char *item)
{
    switch (view->dtype) {
    case DTYPE_F16: return half_to_float(AS(uint16_t));
    case DTYPE_BF16: return bfloat_to_float(AS(uint16_t));
    case DTYPE_F32: return AS(float);
    case DTYPE_F64: return AS(double);
    case DTYPE_BOOL: return AS(uint8_t) != 0;
    case DTYPE_I8: return AS(int8_t);
    case DTYPE_U8: return AS(uint8_t);
    case DTYPE_I16: return AS(int16_t);
    case DTYPE_U16: return AS(uint16_t);
    case DTYPE_I32: return AS(int32_t);
    case DTYPE_U32: return AS(uint32_t);
    case DTYPE_I64: return (double)AS(int64_t);
    case DTYPE_U64: return (double)AS(uint64_t);
    }
    return NAN;
}

void put_real(const array_view *view, char *item, double value)
{
    switch (view->dtype) {
    case DTYPE_F64: memcpy(item, &value, sizeof value); break;
    case DTYPE_F32: memcpy(item, &(float){(float)value}, sizeof(float)); break;
    case DTYPE_F16: memcpy(item, &(uint16_t){float_to_half((float)value)}, sizeof(uint16_t)); break;
    case DTYPE_BF16: memcpy(item, &(uint16_t){float_to_bfloat((float)value)}, sizeof(uint16_t)); break;
    default: *(uint8_t *)item = (uint8_t)value;
    }
}

static int64_t label_at(const array_view *view, const char *item)
{
    switch (view->dtype) {
    case DTYPE_I8: return AS(int8_t);
    case DTYPE_U8: return AS(uint8_t);
    case DTYPE_I16: return AS(int16_t);
    case DTYPE_U16: return AS(uint16_t);
    case DTYPE_I32: return AS(int32_t);
    case DTYPE_U32: return AS(uint32_t);
    case DTYPE_I64: return AS(int64_t);
    default: { /* from 2^63 on no label is right, nor the one to ignore, which then is none under 0 */
        uint64_t label = AS(uint64_t);
        return label > INT64_MAX ? INT64_MIN : (int64_t)label;
    }
    }
}

static void view_labels(const array_view *view, ptrdiff_t first, ptrdiff_t n, int64_t *labels)
{
    if (view->dtype == DTYPE_I64 && view->ndim == 1 && view->stride[0] == 8)
        memcpy(labels, view->data + 8 * first, 8 * (size_t)n);
    else
        for (ptrdiff_t i = 0; i < n; i++)
            labels[i] = label_at(view, view->data + view_offset(view, first + i));
}

/* n rows from `first` on, as labels; returns how many, all of them or those before the first bad one. */
ptrdiff_t rows_labels(const softmax_job *job, ptrdiff_t first, ptrdiff_t n, int64_t *labels,
                      block_result *result)
{
    result->first_bad = -1;
    view_labels(&job->target, first, n, labels);
    for (ptrdiff_t i = 0; i < n; i++)
        if (labels[i] != job->ignore_index && (labels[i] < 0 || labels[i] >= job->n_classes)) {
            result->first_bad = first + i;
            return i;
        }
    return n;
}

/* The same of a block's rows */
ptrdiff_t block_labels(const softmax_job *job, ptrdiff_t block, int64_t *labels, block_result *result)
{
    ptrdiff_t first = block * job->block_rows;
    ptrdiff_t n = job->n_rows - first < job->block_rows ? job->n_rows - first : job->block_rows;
    return rows_labels(job, first, n, labels, result);
}

/* A block's logits where losses alone are asked for, in bytes: of rows one after another, and side by side;
 * this processor's once the tables are asked for */
static ptrdiff_t loss_bytes[2] = {LANES_SHORT_BYTES, LANES_TILE_BYTES};

/* Rows of a block if rows go by lanes, else 0. The logits of a block of short rows stay in the nearest cache;
 * rows side by side make long runs of each class, and their exponentials stay in a tile if they can. Where
 * they cannot but in short runs, long ones are worth more than that and blocks for many threads: each class
 * begins on another page. */
ptrdiff_t lanes_rows(const softmax_job *job)
{
    const array_view *x = &job->logits;
    int are_beside = x->ndim > 0 && x->stride[x->ndim - 1] == x->itemsize && x->class_stride != x->itemsize;
    if (job->n_classes > INT32_MAX || (job->n_classes >= FEW_CLASSES && !are_beside))
        return 0;
    ptrdiff_t class_bytes = job->n_classes * (x->dtype == DTYPE_F64 ? 8 : 4);
    ptrdiff_t most = (are_beside ? LANES_TILE_BYTES : LANES_SHORT_BYTES) / class_bytes - 16;
    ptrdiff_t least = are_beside ? LANES_LEAST_BESIDE : LANES_LEAST_SHORT;
    int is_long = are_beside && most < least;
    if (job->second_pass == GRADIENT && job->n_classes <= LANES_PLAIN_CLASSES) {
        most = (are_beside ? LANES_BESIDE_GRADIENT_BYTES : LANES_SHORT_GRADIENT_BYTES) / class_bytes - 16;
    } else if (job->second_pass == NOTHING && !job->figures && most > least) {
        most = loss_bytes[are_beside] / class_bytes - 16;
        most = most < least ? least : most;
    }
    most = most < LANES_ROWS && !is_long ? most : LANES_ROWS;
    ptrdiff_t share = job->n_rows / (is_long ? 4 : 64); /* work for many threads */
    most = most < share ? most : share;
    return most < 64 ? 64 : most / 64 * 64;
}

/* Classes of a part of few long rows that lie side by side, or 0 where they are not shared by class */
static ptrdiff_t lanes_part_classes(const softmax_job *job)
{
    const array_view *x = &job->logits;
    ptrdiff_t n = (job->n_classes + LANES_PARTS - 1) / LANES_PARTS;
    int are_few = x->ndim == 1 && x->stride[0] == x->itemsize && x->class_stride != x->itemsize &&
                  job->n_rows >= 64 && job->n_rows <= LANES_ROWS;
    int is_simple =
        job->target_kind != PROBABILITIES && !job->gamma && !job->figures && job->second_pass != ENTROPY;
    return are_few && is_simple && job->n_rows * job->n_classes * x->itemsize >= LANES_PARTS_FROM && n > 64
               ? n
               : 0;
}

size_t lanes_parts_bytes(const softmax_job *job)
{
    ptrdiff_t n_parts = (job->n_classes + job->part_classes - 1) / job->part_classes;
    size_t reals = (size_t)(n_parts * LANES_PART_REALS + LANES_STATE_REALS);
    return reals * (job->logits.dtype == DTYPE_F64 ? sizeof(double) : sizeof(float));
}

/* How often a block takes so many rows at once: seldom enough that there is work for many threads */
static ptrdiff_t blocks_at_once(const softmax_job *job)
{
    ptrdiff_t times = job->n_rows / (64 * job->rows_at_once);
    return times < 1 ? 1 : times < 16 ? times : 16;
}

/* How a job whose arrays are described goes through its rows; returns the bytes of scratch that a thread
 * needs. */
size_t plan_rows(softmax_job *job)
{
    int itemsize = job->logits.itemsize < 4 ? 4 : job->logits.itemsize;
    ptrdiff_t row_bytes = job->n_classes * itemsize;
    job->streams = job->out.data && job->n_rows * row_bytes >= STREAM_FROM;
    job->block_rows = job->rows_at_once = lanes_rows(job);
    job->part_classes = job->block_rows ? lanes_part_classes(job) : 0;
    if (job->part_classes)
        job->block_rows = job->rows_at_once = job->n_rows;
    job->kept_bytes = 0;
    job->keeps_exps = 0;
    if (job->block_rows) {
        /* Gradients of rows are written while the next of the block are summed. */
        if (job->streams && job->second_pass == GRADIENT && !job->part_classes)
            job->block_rows *= blocks_at_once(job);
        return 0;
    }
    ptrdiff_t fitting = row_bytes ? BLOCK_BYTES / row_bytes : BLOCK_ROWS;
    job->rows_at_once = fitting < 1 ? 1 : fitting < BLOCK_ROWS ? fitting : BLOCK_ROWS;
    job->keeps_exps =
        (job->second_pass == GRADIENT || job->second_pass == SOFTMAX) && job->lse_in.data == NULL;
    job->block_rows = job->rows_at_once;
    if (job->streams && (job->keeps_exps || job->second_pass == LOG_SOFTMAX)) {
        /* While rows of a block are written, others are summed: not those that come last. */
        job->rows_at_once = job->rows_at_once > 1 ? job->rows_at_once / 2 : 1;
        job->block_rows = job->rows_at_once * blocks_at_once(job);
    }
    /* Rows' exponentials in whole groups of vectors */
    size_t kept = (size_t)(job->rows_at_once * (row_bytes + 256));
    job->kept_bytes = (kept + 63) / 64 * 64 + PAGE;
    job->keeps_exps = job->keeps_exps && job->kept_bytes <= KEEP_BYTES;
    return job->keeps_exps ? KEPT_SCALES_BYTES + 2 * job->kept_bytes : 0;
}

/* Where the target is, too: a label near 1 must not be rounded before 1 - y is taken. */
int is_pointwise_in_double(const pointwise_job *job)
{
    return job->x.dtype == DTYPE_F64 || (job->target.data && job->target.dtype == DTYPE_F64);
}

/* Room for a block's elements, in whole lines of any vectors */
ptrdiff_t tile_elements(const pointwise_job *job)
{
    ptrdiff_t n = job->n_elements < BLOCK_ELEMENTS ? job->n_elements : BLOCK_ELEMENTS;
    return (n + 63) / 64 * 64;
}

size_t pointwise_scratch_bytes(const pointwise_job *job)
{
    size_t size = is_pointwise_in_double(job) ? sizeof(double) : sizeof(float);
    return POINTWISE_TILES * (size_t)tile_elements(job) * size;
}

void nll_block(const void *softmax, ptrdiff_t block, void *scratch, block_result *result)
{
    (void)scratch;
    const softmax_job *job = softmax;
    int64_t labels[BLOCK_ELEMENTS];
    ptrdiff_t first = block * job->block_rows;
    ptrdiff_t n = block_labels(job, block, labels, result);
    compensated total = {0, 0};
    for (ptrdiff_t i = 0; i < n; i++) {
        double loss = 0;
        if (labels[i] != job->ignore_index) {
            const char *row = job->logits.data + view_offset(&job->logits, first + i);
            double weight = job->beta ? job->beta[labels[i]] : 1;
            double cost = -view_real(&job->logits, row + labels[i] * job->logits.class_stride);
            loss = weight == 0 && isinf(cost) ? 0 : weight * cost;
            result->counted++;
            add(&total, loss);
        }
        if (job->loss.data)
            put_real(&job->loss, job->loss.data + view_offset(&job->loss, first + i), loss);
    }
    result->total = value_of(&total);
}

extern const kernel_table logitloss_table_baseline;
#ifdef __x86_64__
extern const kernel_table logitloss_table_avx2, logitloss_table_avx512;
#endif

distances in_order = {2048, 8192};

#ifdef __x86_64__
/* Zen 5 has its lines in the first-level cache as soon, and loses time where it is asked for each of them
 * twice. The one just behind is there already: to ask for that costs nothing. On an Intel of 2024 the second
 * distance is best a page and two lines: beside 8 KB, float16 rows and a binary loss take a fifth less time,
 * gradients and logarithms of long rows a tenth, long float32 rows a twentieth; a line more or less loses
 * half of that. There losses by lanes take a tenth less time in smaller blocks, as what belongs to a block's
 * rows stays in the nearest cache with the logits to come. */
static void know_processor(void)
{
    enum { ZEN_5 = 26 };
    unsigned version, other;
    if (__builtin_cpu_is("intel")) {
        in_order = (distances){2048, 4096 + 2 * 64};
        loss_bytes[0] = 10 << 10;
        loss_bytes[1] = 40 << 10;
    }
    if (__builtin_cpu_is("amd") && __get_cpuid(1, &version, &other, &other, &other) &&
        (version >> 8 & 15) + (version >> 20 & 255) == ZEN_5)
        in_order = (distances){8192, 64};
}
#endif

const kernel_table *const *logitloss_tables(void)
{
    static const kernel_table *tables[4];
    int n = 0;
#ifdef __x86_64__
    __builtin_cpu_init();
    know_processor();
    int has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables[n++] = &logitloss_table_avx512;
    if (has_avx2)
        tables[n++] = &logitloss_table_avx2;
#endif
    tables[n++] = &logitloss_table_baseline;
    tables[n] = NULL;
    return tables;
}
