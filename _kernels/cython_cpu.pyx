# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The Cython backend: walks the blocks of a batch with OpenMP and calls the C rows of one instruction set.

A call describes its arrays to the C rows (address, dtype, shape and strides, axes joined where they can be),
cuts the batch into blocks by shape alone, runs them without the GIL, and adds the blocks' totals in order: so
the result does not depend on the number of threads. What the methods mean stands in the contract,
`__init__.py`; the arithmetic is in `c/`.
"""

cimport numpy as cnp
from cython.parallel cimport prange, threadid
from libc.stddef cimport ptrdiff_t
from libc.math cimport NAN, isfinite
from libc.stdint cimport INT64_MIN, PTRDIFF_MAX, int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc

import numpy as np

cnp.import_array()


cdef extern from *:
    """
    #ifdef _OPENMP
    #define LOGITLOSS_OPENMP _OPENMP
    #else
    #define LOGITLOSS_OPENMP 0
    #endif
    """
    const int LOGITLOSS_OPENMP
    const char *COMPILER "__VERSION__"
    const unsigned long CYTHON_HEX_VERSION


cdef extern from "kernels.h" nogil:
    ctypedef enum dtype_code:
        DTYPE_F16, DTYPE_BF16, DTYPE_F32, DTYPE_F64, DTYPE_BOOL
        DTYPE_I8, DTYPE_U8, DTYPE_I16, DTYPE_U16, DTYPE_I32, DTYPE_U32, DTYPE_I64, DTYPE_U64

    ctypedef enum target_kind_t "target_kind":
        LABELS, PROBABILITIES, NO_TARGET

    ctypedef enum second_pass_t "second_pass":
        NOTHING, GRADIENT, SOFTMAX, LOG_SOFTMAX, ENTROPY

    ctypedef enum pointwise_kind:
        BCE_WITH_LOGITS, BCE, KL_DIV, KL_DIV_LOG_TARGET, SIGMOID, LOG_SIGMOID

    const int BLOCK_ELEMENTS, SEGMENT, PART_BYTES, STREAM_FROM, COUNT_ROWS, RANKING_BINS

    ctypedef struct array_view:
        char *data
        dtype_code dtype
        int itemsize
        int ndim
        ptrdiff_t *shape
        ptrdiff_t *stride
        ptrdiff_t class_stride

    ctypedef struct block_result:
        double total
        ptrdiff_t counted
        ptrdiff_t first_bad

    ctypedef struct softmax_job:
        target_kind_t target_kind
        second_pass_t second_pass
        ptrdiff_t n_rows, n_classes, block_rows
        array_view logits, target
        int64_t ignore_index
        const double *beta
        const double *gamma
        const void *gamma_real
        double gamma_sum, target_scale, target_offset, z_loss
        array_view scale, lse_in, loss, lse, out
        double *figures
        void *parts
        ptrdiff_t part_classes
        int keeps_exps

    ctypedef struct pointwise_job:
        pointwise_kind kind
        int is_signed
        ptrdiff_t n_elements
        array_view x, target, weight, pos_weight, scale, loss, out
        double label_smoothing
        int streams

    ctypedef struct count_job:
        ptrdiff_t n_rows
        array_view loss
        const uint8_t *counted
        const double *figures
        array_view logits, target
        double ignored

    ctypedef struct row_counts:
        pass

    ctypedef void (*block_function)(
        const void *job, ptrdiff_t block, void *scratch, block_result *result
    ) noexcept nogil

    ctypedef struct kernel_table:
        const char *isa
        block_function softmax_block, part_statistics, part_second_pass
        block_function label_weight_block, pointwise_block
        void (*count_block)(
            const count_job *job, ptrdiff_t block, uint32_t *ranking, row_counts *found
        ) noexcept nogil
        void (*merge_counts)(row_counts *into, const row_counts *found) noexcept nogil

    const kernel_table *const *logitloss_tables()
    ptrdiff_t lanes_rows(const softmax_job *job)
    size_t lanes_parts_bytes(const softmax_job *job)
    size_t plan_rows(softmax_job *job)
    size_t pointwise_scratch_bytes(const pointwise_job *job)
    void nll_block(const void *job, ptrdiff_t block, void *scratch, block_result *result) noexcept nogil


cdef enum:
    # Threads share rows of more than a segment, if there are fewer than this.
    FEW_ROWS = 64
    # What so many blocks found takes 1.5 MB, whatever the size of the batch.
    ROUND_BLOCKS = 1 << 16
    # How often a thread comes back for blocks: so often that threads end together, so seldom that what lies
    # behind those it takes is rarely fetched in vain.
    TURNS = 64
    # Blocks that are counted before their counts are merged: 600 kB of them
    ROUND_COUNTS = 256
    # Blocks after which threads' rankings are added up: of 2**31 rows, which 32 bits can count
    RANKED_BLOCKS = 1 << 19
    RANKING_SLICE = 1 << 12


cdef dtype_code dtype_of(cnp.ndarray array):
    cdef int number = cnp.PyArray_TYPE(array)
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(array)
    if number == cnp.NPY_BOOL:
        return DTYPE_BOOL
    if cnp.PyTypeNum_ISUNSIGNED(number):
        return DTYPE_U8 if size == 1 else DTYPE_U16 if size == 2 else DTYPE_U32 if size == 4 else DTYPE_U64
    if cnp.PyTypeNum_ISSIGNED(number) and cnp.PyTypeNum_ISINTEGER(number):
        return DTYPE_I8 if size == 1 else DTYPE_I16 if size == 2 else DTYPE_I32 if size == 4 else DTYPE_I64
    if size == 2:
        return DTYPE_F16 if number == cnp.NPY_FLOAT16 else DTYPE_BF16
    return DTYPE_F32 if size == 4 else DTYPE_F64


cdef ptrdiff_t describe(array_view *view, object given, bint has_classes) except -1:
    """Fill in a view; returns its rows or elements. The axes are joined where strides allow."""
    if given is None:
        view.data = NULL
        return 0
    cdef cnp.ndarray array = given
    cdef int n_axes = cnp.PyArray_NDIM(array) - has_classes
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef cnp.npy_intp *stride = cnp.PyArray_STRIDES(array)
    cdef ptrdiff_t n = 1
    cdef int axis, last
    view.data = cnp.PyArray_BYTES(array)
    view.dtype = dtype_of(array)
    view.itemsize = cnp.PyArray_ITEMSIZE(array)
    view.class_stride = stride[n_axes] if has_classes else 0
    view.ndim = 0
    for axis in range(n_axes):
        n *= shape[axis]
        if shape[axis] == 1:
            continue
        last = view.ndim - 1
        if last >= 0 and view.stride[last] == stride[axis] * shape[axis]:
            view.shape[last] *= shape[axis]
            view.stride[last] = stride[axis]
        else:
            view.shape[view.ndim] = shape[axis]
            view.stride[view.ndim] = stride[axis]
            view.ndim += 1
    return n


cdef int describe_scale(array_view *view, double *number, object scale) except -1:
    """Fill in the view of an array, or of a number repeated without end; 1 needs none."""
    if isinstance(scale, cnp.ndarray):
        describe(view, scale, False)
        return 0
    number[0] = scale
    view.data = NULL if number[0] == 1 else <char *> number
    view.dtype = DTYPE_F64
    view.itemsize = sizeof(double)
    view.ndim = 1
    view.shape[0] = PTRDIFF_MAX
    view.stride[0] = view.class_stride = 0
    return 0


cdef block_result run(
    const void *job, block_function block, ptrdiff_t n_items, ptrdiff_t in_block, size_t scratch_bytes,
    int num_threads
) except *:
    """Run all blocks, ROUND_BLOCKS at a time, and add up what they found, in order.

    A thread takes some blocks whenever it is free, as one may be slower than another, and has its own scratch
    memory.
    """
    cdef block_result whole, one
    cdef double before, added, lost = 0
    cdef block_result *found = &one
    cdef char *memory = NULL
    cdef char *scratch = NULL
    cdef ptrdiff_t b, n, turn, first = 0, n_blocks = (n_items + in_block - 1) // in_block
    cdef int n_threads = <int> min(num_threads, max(1, n_blocks))
    cdef size_t found_bytes = min(n_blocks, ROUND_BLOCKS) * sizeof(block_result) if n_blocks > 1 else 0
    whole.total, whole.counted, whole.first_bad = 0, 0, -1
    if found_bytes or scratch_bytes:
        found_bytes = in_lines(found_bytes)
        scratch_bytes = in_lines(scratch_bytes)
        memory = <char *> malloc(63 + found_bytes + n_threads * scratch_bytes)
        if memory == NULL:
            raise MemoryError(f"no memory for {found_bytes} bytes and {scratch_bytes} for each thread")
        scratch = memory + (-<size_t> memory) % 64
        if found_bytes:
            found = <block_result *> scratch
        scratch += found_bytes
    with nogil:
        while first < n_blocks and whole.first_bad < 0:
            n = min(n_blocks - first, ROUND_BLOCKS)
            for b in range(n):
                found[b].total, found[b].counted, found[b].first_bad = 0, 0, -1
            if n_threads == 1 or n == 1:
                for b in range(n):
                    block(job, first + b, scratch, found + b)
            else:
                turn = max(1, n // (TURNS * n_threads))
                for b in prange(n, num_threads=n_threads, schedule="dynamic", chunksize=turn):
                    block(job, first + b, scratch + threadid() * scratch_bytes, found + b)
            for b in range(n):
                before = whole.total
                whole.total += found[b].total
                added = whole.total - before
                if isfinite(whole.total):
                    lost += (before - (whole.total - added)) + (found[b].total - added)
                whole.counted += found[b].counted
                if found[b].first_bad >= 0:
                    whole.first_bad = found[b].first_bad
                    break
            first += n
    free(memory)
    whole.total += lost
    return whole


cdef inline size_t in_lines(size_t size) noexcept nogil:
    """Return the size of the cache lines that hold so much."""
    return (size + 63) // 64 * 64


cdef double *address(cnp.ndarray numbers):
    return NULL if numbers is None else <double *> cnp.PyArray_DATA(numbers)


cdef class Kernels:
    """The contract's operations with the C rows of one instruction set."""

    cdef const kernel_table *table
    cdef readonly str name

    cdef block_result run_softmax(
        self, softmax_job *job, object logits, object out, int num_threads
    ) except *:
        cdef size_t scratch_bytes
        cdef bint has_class_axis = job.second_pass != ENTROPY
        job.n_classes = cnp.PyArray_DIM(logits, cnp.PyArray_NDIM(logits) - 1)
        job.n_rows = describe(&job.logits, logits, True)
        describe(&job.out, out, has_class_axis)
        scratch_bytes = plan_rows(job)
        job.parts = NULL
        if job.part_classes:
            return self.run_parts(job, 1, job.part_classes, lanes_parts_bytes(job), num_threads)
        if job.n_classes > SEGMENT and 0 < job.n_rows < FEW_ROWS and not lanes_rows(job):
            job.keeps_exps = False
            return self.run_parts(job, job.n_rows, SEGMENT, 0, num_threads)
        return run(job, self.table.softmax_block, job.n_rows, job.block_rows, scratch_bytes, num_threads)

    cdef block_result run_parts(
        self, softmax_job *job, ptrdiff_t n_apart, ptrdiff_t part_classes, size_t n_bytes, int num_threads
    ) except *:
        """Share few long rows among the threads: parts' statistics, rows' losses, parts' second pass.

        They are in parts one by one (n_apart), or all together.
        """
        cdef ptrdiff_t n_parts = (job.n_classes + part_classes - 1) // part_classes
        cdef block_result found
        n_bytes = n_bytes or job.n_rows * (n_parts + 1) * PART_BYTES
        job.parts = malloc(n_bytes)
        if job.parts == NULL:
            raise MemoryError(f"no memory for the {n_parts} parts of {job.n_rows} rows")
        try:
            run(job, self.table.part_statistics, n_apart * n_parts, 1, 0, num_threads)
            found = run(job, self.table.softmax_block, job.n_rows, job.n_rows // n_apart, 0, num_threads)
            if found.first_bad < 0 and job.second_pass != NOTHING and job.second_pass != ENTROPY:
                run(job, self.table.part_second_pass, n_apart * n_parts, 1, 0, num_threads)
        finally:
            free(job.parts)
        return found

    def label_weight(
        self, cnp.ndarray target, cnp.ndarray weight, int64_t ignore_index, ptrdiff_t n_classes,
        int num_threads
    ):
        cdef softmax_job job
        cdef block_result found
        job.n_rows = describe(&job.target, target, False)
        job.n_classes = n_classes
        job.block_rows = BLOCK_ELEMENTS
        job.ignore_index = ignored_label(target, ignore_index)
        job.beta = address(weight)
        found = run(&job, self.table.label_weight_block, job.n_rows, BLOCK_ELEMENTS, 0, num_threads)
        return found.total, found.first_bad

    def nll(
        self, cnp.ndarray log_probabilities, cnp.ndarray target, int64_t ignore_index, cnp.ndarray weight,
        loss, int num_threads
    ):
        cdef softmax_job job
        cdef block_result found
        job.n_classes = cnp.PyArray_DIM(log_probabilities, cnp.PyArray_NDIM(log_probabilities) - 1)
        job.n_rows = describe(&job.target, target, False)
        describe(&job.logits, log_probabilities, True)
        describe(&job.loss, loss, False)
        job.block_rows = BLOCK_ELEMENTS
        job.ignore_index = ignored_label(target, ignore_index)
        job.beta = address(weight)
        found = run(&job, nll_block, job.n_rows, BLOCK_ELEMENTS, 0, num_threads)
        return found.total, found.counted, found.first_bad

    def cross_entropy(
        self, cnp.ndarray logits, cnp.ndarray target, int64_t ignore_index, cnp.ndarray beta,
        cnp.ndarray gamma, double z_loss, scale, lse_in, loss, lse, cnp.ndarray figures, grad,
        int num_threads
    ):
        cdef softmax_job job
        cdef block_result found
        cdef double number
        cdef cnp.ndarray gamma_real = real_coefficients(gamma, logits)
        job.target_kind = LABELS
        job.second_pass = NOTHING if grad is None else GRADIENT
        job.ignore_index = ignored_label(target, ignore_index)
        job.beta = address(beta)
        job.gamma = address(gamma)
        job.gamma_real = address(gamma_real)
        job.gamma_sum = 0 if gamma is None else gamma.sum()
        job.z_loss = z_loss
        describe(&job.target, target, False)
        describe_scale(&job.scale, &number, scale)
        describe(&job.lse_in, lse_in if loss is None and lse is None else None, False)
        describe(&job.loss, loss, False)
        describe(&job.lse, lse, False)
        job.figures = address(figures)
        found = self.run_softmax(&job, logits, grad, num_threads)
        return found.total, found.counted, found.first_bad

    def soft_cross_entropy(
        self, cnp.ndarray logits, cnp.ndarray target, cnp.ndarray weight, double target_scale,
        double target_offset, double z_loss, scale, lse_in, loss, lse, grad, int num_threads
    ):
        cdef softmax_job job
        cdef double number
        cdef cnp.ndarray weight_real = real_coefficients(weight, logits)
        job.target_kind = PROBABILITIES
        job.second_pass = NOTHING if grad is None else GRADIENT
        job.beta = NULL
        job.gamma = address(weight)
        job.gamma_real = address(weight_real)
        job.gamma_sum = 0
        job.target_scale = target_scale
        job.target_offset = target_offset
        job.z_loss = z_loss
        describe(&job.target, target, True)
        describe_scale(&job.scale, &number, scale)
        describe(&job.lse_in, lse_in if loss is None and lse is None else None, False)
        describe(&job.loss, loss, False)
        describe(&job.lse, lse, False)
        job.figures = NULL
        return self.run_softmax(&job, logits, grad, num_threads).total

    cdef activation(self, second_pass_t second_pass, logits, lse, out, int num_threads):
        cdef softmax_job job
        job.target_kind = NO_TARGET
        job.second_pass = second_pass
        job.beta = job.gamma = NULL
        job.gamma_real = NULL
        job.gamma_sum = job.z_loss = 0
        job.scale.data = job.lse_in.data = job.loss.data = NULL
        job.figures = NULL
        describe(&job.lse, lse, False)
        self.run_softmax(&job, logits, out, num_threads)

    def logsumexp(self, cnp.ndarray logits, lse, int num_threads):
        self.activation(NOTHING, logits, lse, None, num_threads)

    def softmax(self, cnp.ndarray logits, out, bint log, int num_threads):
        self.activation(LOG_SOFTMAX if log else SOFTMAX, logits, None, out, num_threads)

    def entropy(self, cnp.ndarray logits, out, int num_threads):
        self.activation(ENTROPY, logits, None, out, num_threads)

    cdef block_result run_pointwise(
        self, pointwise_job *job, x, target, weight, pos_weight, scale, loss, out, int num_threads
    ) except *:
        cdef double number
        job.n_elements = describe(&job.x, x, False)
        describe(&job.target, target, False)
        describe(&job.weight, weight, False)
        describe(&job.pos_weight, pos_weight, False)
        describe_scale(&job.scale, &number, scale)
        describe(&job.loss, loss, False)
        describe(&job.out, out, False)
        job.streams = out is not None and job.n_elements * job.out.itemsize >= STREAM_FROM
        cdef block_function block = self.table.pointwise_block
        return run(job, block, job.n_elements, BLOCK_ELEMENTS, pointwise_scratch_bytes(job), num_threads)

    def binary_cross_entropy_with_logits(
        self, cnp.ndarray logits, cnp.ndarray target, weight, pos_weight, double label_smoothing,
        bint signed, scale, loss, grad, int num_threads
    ):
        cdef pointwise_job job
        cdef block_result found
        job.kind = BCE_WITH_LOGITS
        job.is_signed = signed
        job.label_smoothing = label_smoothing
        found = self.run_pointwise(&job, logits, target, weight, pos_weight, scale, loss, grad, num_threads)
        return found.total, found.first_bad

    cdef block_result plain_pointwise(
        self, pointwise_kind kind, x, target, weight, loss, out, int num_threads
    ) except *:
        cdef pointwise_job job
        job.kind = kind
        job.is_signed = False
        job.label_smoothing = 0
        return self.run_pointwise(&job, x, target, weight, None, 1, loss, out, num_threads)

    def binary_cross_entropy(
        self, cnp.ndarray probabilities, cnp.ndarray target, weight, loss, int num_threads
    ):
        cdef block_result found = self.plain_pointwise(
            BCE, probabilities, target, weight, loss, None, num_threads
        )
        return found.total, found.first_bad

    def kl_div(
        self, cnp.ndarray log_probabilities, cnp.ndarray target, bint log_target, loss, int num_threads
    ):
        cdef pointwise_kind kind = KL_DIV_LOG_TARGET if log_target else KL_DIV
        return self.plain_pointwise(kind, log_probabilities, target, None, loss, None, num_threads).total

    def sigmoid(self, cnp.ndarray logits, out, bint log, int num_threads):
        self.plain_pointwise(LOG_SIGMOID if log else SIGMOID, logits, None, None, None, out, num_threads)

    def count_rows(
        self, cnp.ndarray loss, cnp.ndarray counted, cnp.ndarray figures, cnp.ndarray logits,
        cnp.ndarray target, ignored, cnp.ndarray counts, cnp.ndarray ranking, int num_threads
    ):
        """Add rows to `counts`, which has the layout of `row_counts`, and logits to `ranking`."""
        cdef count_job job
        if cnp.PyArray_NBYTES(counts) != sizeof(row_counts):
            raise ValueError(f"counts of {counts.nbytes} bytes, expected {sizeof(row_counts)}")
        job.n_rows = describe(&job.loss, loss, False)
        job.counted = NULL if counted is None else <uint8_t *> cnp.PyArray_DATA(counted)
        job.figures = address(figures)
        describe(&job.logits, logits, False)
        describe(&job.target, target, False)
        job.ignored = NAN if ignored is None else ignored
        run_counts(
            self.table, &job, <row_counts *> cnp.PyArray_DATA(counts),
            NULL if ranking is None else <int64_t *> cnp.PyArray_DATA(ranking), num_threads
        )


cdef int run_counts(
    const kernel_table *table, count_job *job, row_counts *counts, int64_t *ranking, int num_threads
) except -1:
    """Count blocks of rows, ROUND_COUNTS at a time, and merge what they found, in order."""
    cdef ptrdiff_t b, n, first = 0, n_blocks = (job.n_rows + COUNT_ROWS - 1) // COUNT_ROWS
    cdef int n_threads = num_threads if n_blocks > 1 else 1
    cdef ptrdiff_t ranked = 2 * RANKING_BINS if ranking != NULL else 0
    cdef row_counts *found = <row_counts *> malloc(min(n_blocks, ROUND_COUNTS) * sizeof(row_counts) + 1)
    cdef uint32_t *rankings = <uint32_t *> calloc(n_threads * ranked + 1, sizeof(uint32_t))
    try:
        if found == NULL or rankings == NULL:
            raise MemoryError(f"no memory to count {job.n_rows} rows")
        with nogil:
            while first < n_blocks:
                n = min(n_blocks - first, ROUND_COUNTS)
                if n_threads == 1 or n == 1:
                    for b in range(n):
                        table.count_block(job, first + b, rankings, found + b)
                else:
                    for b in prange(n, num_threads=n_threads, schedule="dynamic"):
                        table.count_block(job, first + b, rankings + threadid() * ranked, found + b)
                for b in range(n):
                    table.merge_counts(counts, found + b)
                first += n
                if first == n_blocks or first % RANKED_BLOCKS == 0:
                    if n_threads == 1:
                        add_rankings(ranking, rankings, 0, ranked, ranked, 1)
                    else:
                        for b in prange(ranked // RANKING_SLICE, num_threads=n_threads):
                            add_rankings(
                                ranking, rankings, b * RANKING_SLICE, RANKING_SLICE, ranked, n_threads
                            )
    finally:
        free(found)
        free(rankings)
    return 0


cdef void add_rankings(
    int64_t *whole, uint32_t *parts, ptrdiff_t first, ptrdiff_t n, ptrdiff_t in_part, int n_parts
) noexcept nogil:
    """Add n bins of each part to the whole, and leave 0 there."""
    cdef ptrdiff_t b
    cdef int part
    for part in range(n_parts):
        for b in range(first, first + n):
            whole[b] += parts[part * in_part + b]
            parts[part * in_part + b] = 0


cdef cnp.ndarray real_coefficients(cnp.ndarray coefficients, cnp.ndarray logits):
    """By class, in the type that the C rows compute these logits in."""
    if coefficients is None:
        return None
    cdef bint is_double = cnp.PyArray_TYPE(logits) == cnp.NPY_DOUBLE
    with np.errstate(over="ignore", under="ignore"):
        return coefficients.astype(np.float64 if is_double else np.float32, copy=False)


cdef int64_t ignored_label(cnp.ndarray target, int64_t ignore_index):
    """Return the label to ignore: for unsigned ones never the lowest integer, which stands for 2**63 on."""
    if ignore_index == INT64_MIN and cnp.PyTypeNum_ISUNSIGNED(cnp.PyArray_TYPE(target)):
        return -1
    return ignore_index


cdef dict _kernels = {}

cdef int i = 0
while logitloss_tables()[i] != NULL:
    _one = Kernels()
    (<Kernels> _one).table = logitloss_tables()[i]
    (<Kernels> _one).name = "cython-" + logitloss_tables()[i].isa.decode()
    _kernels[logitloss_tables()[i].isa.decode()] = _one
    i += 1


def available_isas():
    """Return the instruction sets that this processor has and this build knows, best first."""
    return tuple(_kernels)


def kernels(isa):
    """Return the backend of one instruction set."""
    return _kernels[isa]


def build_info():
    """Say what this module was built with."""
    return {
        "compiler": COMPILER.decode(),
        "cython": ".".join(str(CYTHON_HEX_VERSION >> shift & 0xFF) for shift in (24, 16, 8)),
        "openmp": LOGITLOSS_OPENMP != 0,
    }
