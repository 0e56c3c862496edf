/* All kernels for one instruction set: a stamp (baseline.c, avx2.c, avx512.c) says which, and includes this.
 */
#include "vector.h"

#include "half.h"

#define REAL f64
#define REAL_IS_F64
#include "real.h"
#undef REAL
#undef REAL_IS_F64

#define REAL f32
#include "real.h"
#undef REAL

static void softmax_block(const void *job, ptrdiff_t block, void *scratch, block_result *result)
{
    if (((const softmax_job *)job)->logits.dtype == DTYPE_F64)
        f64_softmax_block(job, block, scratch, result);
    else
        f32_softmax_block(job, block, scratch, result);
}

static void part_statistics(const void *job, ptrdiff_t block, void *scratch, block_result *result)
{
    (void)scratch, (void)result;
    if (((const softmax_job *)job)->logits.dtype == DTYPE_F64)
        f64_part_block(job, block, 0);
    else
        f32_part_block(job, block, 0);
}

static void part_second_pass(const void *job, ptrdiff_t block, void *scratch, block_result *result)
{
    (void)scratch, (void)result;
    if (((const softmax_job *)job)->logits.dtype == DTYPE_F64)
        f64_part_block(job, block, 1);
    else
        f32_part_block(job, block, 1);
}

/* What a mean divides by: the counted labels' weights. */
static void label_weight_block(const void *softmax, ptrdiff_t block, void *scratch, block_result *result)
{
    (void)scratch;
    const softmax_job *job = softmax;
    int64_t labels[BLOCK_ELEMENTS];
    if (!job->beta && job->n_classes <= INT32_MAX) {
        ptrdiff_t n_counted = f32_count_labels(job, block);
        if (n_counted >= 0) {
            result->counted = n_counted;
            result->total = (double)n_counted;
            return;
        }
    }
    compensated total = {0, 0};
    ptrdiff_t n = block_labels(job, block, labels, result);
    for (ptrdiff_t i = 0; i < n; i++)
        if (labels[i] != job->ignore_index) {
            result->counted++;
            add(&total, job->beta ? job->beta[labels[i]] : 1);
        }
    result->total = value_of(&total);
}

static void pointwise_block(const void *job, ptrdiff_t block, void *scratch, block_result *result)
{
    if (is_pointwise_in_double(job))
        f64_pointwise_block(job, block, scratch, result);
    else
        f32_pointwise_block(job, block, scratch, result);
}

#define STRING_(text) #text
#define STRING(text) STRING_(text)

const kernel_table PASTE(logitloss_table, ISA) = {STRING(ISA),      softmax_block,      part_statistics,
                                                  part_second_pass, label_weight_block, pointwise_block,
                                                  count_block,      merge_counts};
