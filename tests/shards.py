"""A data set in shards, and the ways in which one of them may be bad.

The fixtures `shards` and `bad` are made of these.
"""

import os

import numpy as np
from cases import rng_for
from command import invoke

from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    FileError,
    LabelError,
    LogitError,
    ShapeError,
    evaluate,
    evaluate_files,
)

N_CLASSES, CHUNK_ROWS = 7, 10
SIZES = (31, 1, 20, 64, 0, 12, 9, 40, 33, 50, 25, 18)  # so many that the tenth is not the second
BAD = 3


class Shards:
    """A directory of logits, one of labels and one of keys, a file of each for each shard."""

    def __init__(self, folder):
        self.folder = folder
        rng = rng_for("shards")
        for name in ("logits", "labels", "keys"):
            (folder / name).mkdir()
        for number, size in enumerate(SIZES):
            self.save("logits", number, 3 * rng.standard_normal((size, N_CLASSES), np.float32))
            ignored, labels = rng.random(size) < 0.1, rng.integers(0, N_CLASSES, size)
            self.save("labels", number, np.where(ignored, -100, labels))
            self.save("keys", number, rng.choice(["a", "b"], size))
        self.paths = str(folder / "logits"), str(folder / "labels")

    def file(self, name, number):
        return str(self.folder / name / f"part-{number + 1}.npy")

    def save(self, name, number, array):
        np.save(self.file(name, number), array)

    def load(self, name, number):
        return np.load(self.file(name, number))

    def change(self, name, number, index, value):
        array = self.load(name, number)
        array[index] = value
        self.save(name, number, array)

    def state(self, *, without=(), groups=False):
        """Return what the arrays of one shard after another come to."""
        state = EvaluationState()
        for number in sorted(set(range(len(SIZES))) - set(without)):
            keys = self.load("keys", number) if groups else None
            arrays = self.load("logits", number), self.load("labels", number)
            state.merge(evaluate(*arrays, groups=keys, chunk_rows=CHUNK_ROWS, backend="reference"))
        return state

    def evaluate(self, *paths, **options):
        paths = paths or self.paths
        return evaluate_files(*map(str, paths), chunk_rows=CHUNK_ROWS, backend="reference", **options)

    def run(self, *options):
        command = ["eval", *self.paths, "--chunk-rows", CHUNK_ROWS, "--backend", "reference", *options]
        return invoke(*command)


def options_of(shards):
    return {"groups_path": str(shards.folder / "keys"), "per_row_path": str(shards.folder / "rows")}


# ---- each spoils the shard BAD, and returns which of its files, the error and the reason ----


def cut(shards):
    with open(shards.file("logits", BAD), "r+b") as file:
        file.truncate(1000)
    return "logits", FileError, r"truncated: \(64, 7\) of float32 takes 1792 bytes, 872 are there"


def header(shards):
    with open(shards.file("labels", BAD), "r+b") as file:
        file.write(b"\x93NUMPY\x01\x00\xff\x7f{")
    return "labels", FileError, "truncated or damaged .npy header"


def missing(shards):
    os.unlink(shards.file("logits", BAD))
    os.symlink("nowhere", shards.file("logits", BAD))
    return "logits", FileError, "No such file or directory"


def fewer_labels(shards):
    shards.save("labels", BAD, shards.load("labels", BAD)[1:])
    return "labels", ShapeError, r"of shape \(63,\), but logits of shape \(64, 7\)"


def more_classes(shards):
    shards.save("logits", BAD, np.zeros((64, 8), np.float32))
    return "logits", ShapeError, "of 8 classes, but shards before have 7"


def other_keys(shards):
    shards.save("keys", BAD, np.arange(64))
    return "keys", DtypeError, "of type int64, but keys of shards before are of type"


def bad_label(shards):
    shards.change("labels", BAD, 37, 7)
    return "labels", LabelError, "row 37: label 7 is outside 0 to 6"


def bad_logit(shards):
    shards.change("labels", BAD, 63, 0)
    shards.change("logits", BAD, (63, 2), np.nan)
    return "logits", LogitError, "row 63: the logit of class 2 is nan"


SPOILERS = [cut, header, missing, fewer_labels, more_classes, other_keys, bad_label, bad_logit]
