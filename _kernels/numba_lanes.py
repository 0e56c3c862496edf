"""Rows in lanes."""
from types import SimpleNamespace

from numba.extending import register_jitable


@register_jitable
def plan(n_rows, n_classes, size, width, are_beside):
    return 0, 0


def kernels(item):
    def softmax_block(jobs, block, scratch, results):
        return

    return SimpleNamespace(softmax_block=softmax_block)
