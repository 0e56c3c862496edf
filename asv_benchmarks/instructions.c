/* One work of the C rows, for callgrind to count: `instructions NUMBER`, or none for the works' names.
 *
 * Only what `measured` calls is counted. One thread, one instruction set, arrays that start on a page, and
 * numbers that are the same every time: so are the instructions, to the last one. The works are small; what
 * is done to a large batch is the same, more often.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef enum { PLAIN, WEIGHTED, WITH_FIGURES } work_kind;

typedef struct {
    const char *name;
    dtype_code dtype;
    ptrdiff_t n_rows, n_classes; /* no classes: elements of a binary cross-entropy */
    second_pass second_pass;
    int are_beside; /* the rows, as with axis=1 */
    work_kind kind;
    dtype_code target;
} work;

static const work works[] = {
    {"cross-entropy 64x8192", DTYPE_F32, 64, 8192, NOTHING, 0, PLAIN, DTYPE_I64},
    {"cross-entropy and gradient 64x8192", DTYPE_F32, 64, 8192, GRADIENT, 0, PLAIN, DTYPE_I64},
    {"cross-entropy 512x1000", DTYPE_F32, 512, 1000, NOTHING, 0, PLAIN, DTYPE_I64},
    {"cross-entropy and gradient 512x1000", DTYPE_F32, 512, 1000, GRADIENT, 0, PLAIN, DTYPE_I64},
    {"cross-entropy 8192x10", DTYPE_F32, 8192, 10, NOTHING, 0, PLAIN, DTYPE_I64},
    {"cross-entropy and gradient 8192x10", DTYPE_F32, 8192, 10, GRADIENT, 0, PLAIN, DTYPE_I64},
    {"cross-entropy 21x16384, axis 1", DTYPE_F32, 16384, 21, NOTHING, 1, PLAIN, DTYPE_I64},
    {"cross-entropy and gradient 21x16384, axis 1", DTYPE_F32, 16384, 21, GRADIENT, 1, PLAIN, DTYPE_I64},
    {"cross-entropy 64x8192, bfloat16", DTYPE_BF16, 64, 8192, NOTHING, 0, PLAIN, DTYPE_I64},
    {"cross-entropy and gradient 64x8192, bfloat16", DTYPE_BF16, 64, 8192, GRADIENT, 0, PLAIN, DTYPE_I64},
    {"cross-entropy 64x8192, float64", DTYPE_F64, 64, 8192, NOTHING, 0, PLAIN, DTYPE_I64},
    {"cross-entropy 64x8192, class weights", DTYPE_F32, 64, 8192, NOTHING, 0, WEIGHTED, DTYPE_I64},
    {"figures 64x8192", DTYPE_F32, 64, 8192, NOTHING, 0, WITH_FIGURES, DTYPE_I64},
    {"figures 512x1000", DTYPE_F32, 512, 1000, NOTHING, 0, WITH_FIGURES, DTYPE_I64},
    {"figures 8192x10", DTYPE_F32, 8192, 10, NOTHING, 0, WITH_FIGURES, DTYPE_I64},
    {"figures 21x16384, axis 1", DTYPE_F32, 16384, 21, NOTHING, 1, WITH_FIGURES, DTYPE_I64},
    {"figures 64x8192, bfloat16", DTYPE_BF16, 64, 8192, NOTHING, 0, WITH_FIGURES, DTYPE_I64},
    {"softmax 64x8192", DTYPE_F32, 64, 8192, SOFTMAX, 0, PLAIN, DTYPE_I64},
    {"log_softmax 64x8192", DTYPE_F32, 64, 8192, LOG_SOFTMAX, 0, PLAIN, DTYPE_I64},
    {"binary cross-entropy 262144", DTYPE_F32, 262144, 0, NOTHING, 0, PLAIN, DTYPE_F32},
    {"binary cross-entropy and gradient 262144", DTYPE_F32, 262144, 0, GRADIENT, 0, PLAIN, DTYPE_F32},
    {"binary cross-entropy 262144, uint8", DTYPE_F32, 262144, 0, NOTHING, 0, PLAIN, DTYPE_U8},
};

static size_t size_of(dtype_code dtype)
{
    static const size_t sizes[] = {2, 2, 4, 8, 1, 1, 1, 2, 2, 4, 4, 8, 8};
    return sizes[dtype];
}

static void *page_of(size_t size)
{
    void *memory = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    if (!memory)
        abort();
    memset(memory, 0, size);
    return memory;
}

static uint32_t random_state = 1;
static uint32_t next_random(void) { return random_state = random_state * 1664525u + 1013904223u; }

/* Between -6 and 6, more often near 0 */
static double next_logit(void)
{
    double sum = 0;
    for (int i = 0; i < 4; i++)
        sum += next_random() * 0x1p-32;
    return 6 * (sum / 2 - 1);
}

static array_view view_of(dtype_code dtype, ptrdiff_t n, ptrdiff_t n_classes, int are_beside)
{
    int size = (int)size_of(dtype);
    array_view view = {.dtype = dtype, .itemsize = size, .ndim = 1, .shape = {n}};
    ptrdiff_t per_row = n_classes ? n_classes : 1;
    view.data = page_of((size_t)(n * per_row) * (size_t)size);
    view.stride[0] = are_beside ? size : per_row * size;
    view.class_stride = are_beside ? n * size : size;
    return view;
}

static array_view logits_of(const work *this)
{
    array_view view = view_of(this->dtype, this->n_rows, this->n_classes, this->are_beside);
    ptrdiff_t n = this->n_rows * (this->n_classes ? this->n_classes : 1);
    for (ptrdiff_t i = 0; i < n; i++)
        put_real(&view, view.data + i * view.itemsize, next_logit());
    return view;
}

/* Noinline, so that callgrind finds it by its name */
__attribute__((noinline)) double measured(const void *job, block_function block, ptrdiff_t n_blocks,
                                          void *scratch)
{
    double total = 0;
    for (ptrdiff_t b = 0; b < n_blocks; b++) {
        block_result found = {0, 0, -1};
        block(job, b, scratch, &found);
        total += found.total;
    }
    return total;
}

static double run_rows(const work *this, const kernel_table *table)
{
    static softmax_job job; /* too large for some stacks */
    ptrdiff_t n_classes = this->n_classes;
    double *beta = page_of((size_t)n_classes * sizeof *beta),
           *gamma = page_of((size_t)n_classes * sizeof *gamma);
    float *gamma_real = page_of((size_t)n_classes * sizeof *gamma_real);
    job.target_kind = this->second_pass == SOFTMAX || this->second_pass == LOG_SOFTMAX ? NO_TARGET : LABELS;
    job.second_pass = this->second_pass;
    job.n_rows = this->n_rows;
    job.n_classes = n_classes;
    job.ignore_index = -100;
    job.logits = logits_of(this);
    if (job.target_kind == LABELS) {
        job.target = view_of(this->target, this->n_rows, 0, 0);
        for (ptrdiff_t i = 0; i < this->n_rows; i++)
            ((int64_t *)(void *)job.target.data)[i] = next_random() % (uint32_t)n_classes;
    }
    if (this->second_pass != NOTHING)
        job.out = view_of(this->dtype, this->n_rows, n_classes, this->are_beside);
    for (ptrdiff_t c = 0; c < n_classes && this->kind == WEIGHTED; c++) {
        double weight = 0.5 + next_random() * 0x1p-32;
        beta[c] = 0.9 * weight;
        gamma[c] = 0.1 * weight / (double)n_classes;
        gamma_real[c] = (float)gamma[c];
        job.gamma_sum += gamma[c];
    }
    if (this->kind == WEIGHTED)
        job.beta = beta, job.gamma = gamma, job.gamma_real = gamma_real;
    if (this->kind == WITH_FIGURES) {
        job.figures = page_of((size_t)this->n_rows * FIGURES * sizeof(double));
        job.loss = view_of(DTYPE_F64, this->n_rows, 0, 0);
    }
    size_t scratch_bytes = plan_rows(&job);
    ptrdiff_t n_blocks = (job.n_rows + job.block_rows - 1) / job.block_rows;
    return measured(&job, table->softmax_block, n_blocks, page_of(scratch_bytes + 1));
}

static double run_elements(const work *this, const kernel_table *table)
{
    static pointwise_job job;
    job.kind = BCE_WITH_LOGITS;
    job.n_elements = this->n_rows;
    job.x = logits_of(this);
    job.target = view_of(this->target, this->n_rows, 0, 0);
    for (ptrdiff_t i = 0; i < this->n_rows; i++)
        put_real(&job.target, job.target.data + i * job.target.itemsize, next_random() >> 31);
    if (this->second_pass == GRADIENT)
        job.out = view_of(this->dtype, this->n_rows, 0, 0);
    return measured(&job, table->pointwise_block, (job.n_elements + BLOCK_ELEMENTS - 1) / BLOCK_ELEMENTS,
                    page_of(pointwise_scratch_bytes(&job)));
}

/* Of one instruction set alone: that is all there is to link */
extern const kernel_table logitloss_table_avx2;

int main(int argc, char **argv)
{
    int n = sizeof works / sizeof *works, number = argc > 1 ? atoi(argv[1]) : -1;
    for (int i = 0; i < n && number < 0; i++)
        puts(works[i].name);
    if (number >= n)
        return 2;
    if (number >= 0)
        printf("%.17g\n",
               (works[number].n_classes ? run_rows : run_elements)(works + number, &logitloss_table_avx2));
    return 0;
}
