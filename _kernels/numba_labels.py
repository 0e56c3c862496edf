"""Labels alone: the sum of their weights, and the negative log-likelihood of log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_items, numba_operations, vectors
from logitloss._kernels.numba_job import (
    block_range,
    coefficient,
    first_bad_label,
    found_at,
    job_at,
    label_of,
    last_stride,
    place,
    put,
    run_length,
)
from logitloss._kernels.vectors import lost_of, outline

# Labels as float32 lanes are exact below this.
MOST_CLASSES = 1 << 24
_SIZES = tuple(numba_items.itemsize(kind) for kind in numba_items.ITEMS)
_lanes = vectors.VECTOR_BYTES // 4
_load_labels = numba_items.label_loader(np.float32, _lanes)
_ops = numba_operations.operations(np.float32)
_splat, _minimum, _lanes_sum, _where = _ops.splat, _ops.minimum, _ops.lanes_sum, _ops.where
_ZERO, _ONE, _IGNORED, _BAD = (np.float32(x) for x in (0, 1, -1, -2))


@outline
def _count(job, first, n):
    """Return how many rows count, or -1 where a label is bad or they do not lie next to each other."""
    target = job.target
    itemsize = last_stride(target)
    if itemsize != _SIZES[target.kind] or run_length(target, first, n) != n:
        return -1
    if job.n_classes >= MOST_CLASSES or n % _lanes:
        return -1
    at, lowest, n_ignored = place(target, first), _splat(_ZERO), _splat(_ZERO)
    for i in range(0, n, _lanes):
        label = _load_labels(target.kind, at + i * itemsize, job.n_classes, job.ignore_index)
        lowest = _minimum(label, lowest)
        n_ignored = n_ignored + _where(label == _IGNORED, _ONE, _ZERO)
    if vectors.any_lane(lowest == _BAD):
        return -1
    return n - np.intp(_lanes_sum(n_ignored))


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for log-probabilities of such items."""
    load = numba_items.loader(item, np.float64)

    def label_weight(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        if job.beta == 0:
            found.total = _count(job, first, n)
            if found.total >= 0:
                return
        found.bad = first_bad_label(job, first, n)
        if found.bad >= 0:
            return
        total, lost = 0.0, 0.0
        for row in range(first, first + n):
            label = label_of(job, row)
            if label != job.ignore_index:
                weight = coefficient(job.beta, label, 1.0)
                lost += lost_of(total, weight)
                total += weight
        found.total = total + lost

    def nll(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        found.bad = first_bad_label(job, first, n)
        if found.bad >= 0:
            return
        total, lost, counted = 0.0, 0.0, 0
        for row in range(first, first + n):
            label, loss = label_of(job, row), 0.0
            if label != job.ignore_index:
                weight = coefficient(job.beta, label, 1.0)
                cost = -load(place(job.logits, row) + label * job.logits.class_stride)
                loss = 0.0 if weight == 0.0 and np.isinf(cost) else weight * cost
                counted += 1
            lost += lost_of(total, loss)
            total += loss
            put(job.loss, row, loss)
        found.total, found.counted = total + lost, counted

    return SimpleNamespace(label_weight=label_weight, nll=nll)
