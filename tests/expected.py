"""Exact results for the shared batches of `cases`, computed once a run: every backend meets them."""

import functools

import oracle
from cases import batch, probabilities, zoo


@functools.cache
def zoo_cross_entropy(n_classes, dtype):
    """Return the zoo's losses and gradients."""
    return oracle.cross_entropy(*zoo(n_classes, dtype))


@functools.cache
def zoo_rows(name, n_classes, dtype):
    """Return what the oracle's function of that name says about the zoo's logits."""
    return getattr(oracle, name)(zoo(n_classes, dtype)[0])


@functools.cache
def batch_cross_entropy(shape, dtype, **options):
    """Return losses and gradients of an ordinary batch with labels; options must be hashable."""
    return oracle.cross_entropy(*batch(shape, dtype), **options)


@functools.cache
def batch_soft_cross_entropy(shape, dtype, **options):
    """Return losses and gradients of an ordinary batch with class probabilities."""
    return oracle.soft_cross_entropy(batch(shape, dtype)[0], probabilities(shape, dtype), **options)
