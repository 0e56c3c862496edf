/* What Cython and the C rows share: how an array is described, what a piece of work is, and the functions
 * that one instruction set offers.
 *
 * A batch is a list of rows (or of elements); they count in C order over the leading axes of the arrays. A
 * block is a range of them whose bounds depend on the shapes alone, so the blocks' totals, added in order,
 * are the same for every number of threads. Nothing here depends on an instruction set.
 */
#ifndef LOGITLOSS_KERNELS_H
#define LOGITLOSS_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MAX_DIMS = 64,
    BLOCK_ROWS = 64,
    BLOCK_ELEMENTS = 4096,
    KEPT_SCALES_BYTES = 1 << 15,
    PAGE = 4096,
    QUARTER_PAGE = PAGE / 4,
    SEGMENT = 1 << 18,
    PART_BYTES = 128,
    /* A second pass writes around the cache when its output is larger than any cache. */
    STREAM_FROM = 1 << 25,
    /* A block's logits stay in the second-level cache for the second pass. */
    BLOCK_BYTES = 1 << 17,
    /* A block's exponentials are kept for the second pass, if they are no more than this. */
    KEEP_BYTES = 1 << 20
};

/* What a row is told beside its loss; the names are the contract's. */
enum { RANK, TOP, TOP_PROBABILITY, ENTROPY_OF_ROW, OTHERS_SQUARED, FIGURES };

/* Of the path with a row in each lane (lanes_block.h) */
enum {
    FEW_CLASSES = 48, /* fewer go by lanes wherever they lie */
    LANES_ROWS = 1024,
    LANES_TILE_BYTES = 1 << 17,
    LANES_SHORT_BYTES = 1 << 14,
    /* Fewer rows cost more than a block's logits out of the nearest cache; images of 300 classes take 2.7
     * times as long in runs of 64. */
    LANES_LEAST_SHORT = 128,
    LANES_LEAST_BESIDE = 320,
    LANES_FETCHED_BYTES = 1 << 14, /* ahead */
    /* Of more classes a plain sum would need more roundings than a result may. */
    LANES_PLAIN_CLASSES = 24,
    /* Where two blocks' exponentials are to be near, those written and those summed (lanes_gradients.h) */
    LANES_BESIDE_GRADIENT_BYTES = 9 << 12,
    LANES_SHORT_GRADIENT_BYTES = 1 << 13,
    /* Rows that threads share by class: how many parts at most, from how much memory on, and their room */
    LANES_PARTS = 64,
    LANES_PARTS_FROM = 1 << 23,
    LANES_PART_REALS = 6 * (LANES_ROWS + 16),
    LANES_STATE_REALS = 64 * (LANES_ROWS + 16)
};

/* Exponentials that are summed by lanes: only so, or kept in the tile too, or there already */
typedef enum { SUMMED, KEPT, GIVEN } powers_are;

typedef enum {
    DTYPE_F16,
    DTYPE_BF16,
    DTYPE_F32,
    DTYPE_F64,
    DTYPE_BOOL,
    DTYPE_I8,
    DTYPE_U8,
    DTYPE_I16,
    DTYPE_U16,
    DTYPE_I32,
    DTYPE_U32,
    DTYPE_I64,
    DTYPE_U64
} dtype_code;

/* An array, axes that can be walked as one already joined. `data` is NULL where an optional array was not
 * given. Strides are in bytes. `class_stride` is that of the class axis, which is not among the `ndim`. */
typedef struct {
    char *data;
    dtype_code dtype;
    int itemsize;
    int ndim;
    ptrdiff_t shape[MAX_DIMS];
    ptrdiff_t stride[MAX_DIMS];
    ptrdiff_t class_stride;
} array_view;

/* What a block found; `first_bad` is the number of a row or element, or -1. */
typedef struct {
    double total;
    ptrdiff_t counted;
    ptrdiff_t first_bad;
} block_result;

typedef enum { LABELS, PROBABILITIES, NO_TARGET } target_kind;
/* What becomes of each logit once its row's statistics are known. */
typedef enum { NOTHING, GRADIENT, SOFTMAX, LOG_SOFTMAX, ENTROPY } second_pass;

/* The softmax family. The names are the contract's (the package's _kernels/__init__.py). */
typedef struct {
    target_kind target_kind;
    second_pass second_pass;
    ptrdiff_t n_rows, n_classes, block_rows;
    array_view logits, target;
    int64_t ignore_index;
    const double *beta; /* by label; NULL is ones */
    const double
        *gamma; /* by class; for LABELS NULL is zeros, for PROBABILITIES it is the weight, NULL is ones */
    const void *gamma_real; /* gamma in the logits' real type: float, or double for float64 */
    double gamma_sum, target_scale, target_offset, z_loss;
    array_view scale, lse_in, loss, lse, out;
    double *figures;        /* of each row FIGURES, or NULL */
    void *parts;            /* of rows that threads share, or NULL; */
    ptrdiff_t part_classes; /* classes of each if rows go by lanes (lanes_parts.h), else 0 */
    ptrdiff_t rows_at_once; /* of a block; their exponentials are kept in the scratch, */
    size_t kept_bytes;      /* in two halves of so many bytes, a page to spare in each, */
    int keeps_exps;         /* or not */
    int streams;            /* `out` is too large for the cache: write around it */
} softmax_job;

typedef enum { BCE_WITH_LOGITS, BCE, KL_DIV, KL_DIV_LOG_TARGET, SIGMOID, LOG_SIGMOID } pointwise_kind;

/* The element-wise family. */
typedef struct {
    pointwise_kind kind;
    int is_signed;
    ptrdiff_t n_elements;
    array_view x, target, weight, pos_weight, scale, loss, out;
    double label_smoothing;
    int streams; /* as above */
} pointwise_job;

enum { POINTWISE_TILES = 7 };

/* Rows to be counted, as an evaluation keeps them (the package's evaluate/counts.py). */
enum {
    COUNT_ROWS = 1 << 12, /* of a block */
    RANK_BINS = 102,      /* 0, of which there is none, to 100, and what is above */
    PROBABILITY_BINS = 15,
    /* Of losses: by a double's first bits, each power of two from 2^-20 to 2^10 in four parts; both ends */
    LOSS_BINS = 122,
    LOSS_BIN_SHIFT = 50,
    LOSS_BIN_FIRST = (1023 - 20) << 2,
    /* Of logits, for each kind of label: from -32 to 32 */
    RANKING_BINS = 1 << 16,
    RANKING_BINS_PER_LOGIT = 1 << 10
};
enum { LOSS_MOMENT, SQUARES_MOMENT, RECIPROCAL_MOMENT, CONFIDENCE_MOMENT, ENTROPY_MOMENT, N_MOMENTS };

typedef struct {
    ptrdiff_t n_rows;
    array_view loss;
    const uint8_t *counted;    /* which rows count; NULL: all but those that figures say are ignored */
    const double *figures;     /* of classes; or NULL */
    array_view logits, target; /* of binary labels; or no data */
    double ignored;            /* label */
} count_job;

typedef struct {
    double sum, lost; /* to rounding: a sum may have thousands of terms */
} compensated;

static inline void add(compensated *total, double term)
{
    double sum = total->sum + term, added = sum - total->sum;
    if (isfinite(sum))
        total->lost += (total->sum - (sum - added)) + (term - added);
    total->sum = sum;
}

static inline double value_of(const compensated *total) { return total->sum + total->lost; }

/* Of how many numbers the sum, and that of their squared deviations from the mean */
typedef struct {
    int64_t n;
    compensated total, deviations;
} moments;

/* What was counted: rows, hits, labels outside 0 to 1; rows in bins, sums in those of probabilities. */
typedef struct {
    int64_t counted, correct, n_bad;
    int64_t ranks[RANK_BINS], losses[LOSS_BINS], n[PROBABILITY_BINS];
    compensated probability[PROBABILITY_BINS], outcome[PROBABILITY_BINS];
    moments moments[N_MOMENTS];
} row_counts;

/* `scratch` is the calling thread's own, of the size that the job asked for. */
typedef void (*block_function)(const void *job, ptrdiff_t block, void *scratch, block_result *result);

typedef struct {
    const char *isa;
    block_function softmax_block; /* of a softmax_job */
    /* Of a job with parts: before that block, and after it if there is a second pass */
    block_function part_statistics, part_second_pass;
    block_function label_weight_block; /* of a softmax_job: of its target alone */
    block_function pointwise_block;    /* of a pointwise_job */
    /* Count a block of rows; logits of binary labels are added to `ranking`, the calling thread's own. */
    void (*count_block)(const count_job *job, ptrdiff_t block, uint32_t *ranking, row_counts *found);
    void (*merge_counts)(row_counts *into, const row_counts *from);
} kernel_table;

/* The tables that this processor can run, best first, ended by NULL. */
const kernel_table *const *logitloss_tables(void);

/* How far behind what a loop reads lies what is fetched meanwhile, in bytes: into the first-level cache and
 * into the second. Most processors have more requests under way for the second, from which a line then comes
 * to the first. */
typedef struct {
    ptrdiff_t first, second;
} distances;

/* Of what lies in order; this processor's once the tables are asked for */
extern distances in_order;

/* Common to all instruction sets (common.c). */
ptrdiff_t view_offset(const array_view *view, ptrdiff_t index);
ptrdiff_t lanes_rows(const softmax_job *job);
size_t lanes_parts_bytes(const softmax_job *job);
size_t plan_rows(softmax_job *job);
int is_pointwise_in_double(const pointwise_job *job);
ptrdiff_t tile_elements(const pointwise_job *job);
size_t pointwise_scratch_bytes(const pointwise_job *job);
ptrdiff_t rows_labels(const softmax_job *job, ptrdiff_t first, ptrdiff_t n, int64_t *labels,
                      block_result *result);
ptrdiff_t block_labels(const softmax_job *job, ptrdiff_t block, int64_t *labels, block_result *result);
double view_real(const array_view *view, const char *item);
void put_real(const array_view *view, char *item, double value);
void nll_block(const void *job, ptrdiff_t block, void *scratch, block_result *result);

#endif
