"""Labels alone: the sum of their weights, and the negative log-likelihood of log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import vectors
from logitloss._kernels.numba_job import (
    block_range,
    coefficient,
    first_bad_label,
    found_at,
    job_at,
    label_of,
    place,
    put,
)


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for log-probabilities of such items."""
    load = vectors.loader(item, np.float64)

    def label_weight(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        found.bad = first_bad_label(job, first, n)
        if found.bad >= 0:
            return
        total = 0.0
        for row in range(first, first + n):
            label = label_of(job, row)
            if label != job.ignore_index:
                total += coefficient(job.beta, label, 1.0)
        found.total = total

    def nll(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        found.bad = first_bad_label(job, first, n)
        if found.bad >= 0:
            return
        total, counted = 0.0, 0
        for row in range(first, first + n):
            label, loss = label_of(job, row), 0.0
            if label != job.ignore_index:
                weight = coefficient(job.beta, label, 1.0)
                cost = -load(place(job.logits, row) + label * job.logits.class_stride)
                loss = 0.0 if weight == 0.0 and np.isinf(cost) else weight * cost
                counted += 1
            total += loss
            put(job.loss, row, loss)
        found.total, found.counted = total, counted

    return SimpleNamespace(label_weight=label_weight, nll=nll)
