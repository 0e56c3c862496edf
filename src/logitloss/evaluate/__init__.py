"""Offline evaluation: what a model's logits, saved to files or held in arrays, are worth against the labels.

`evaluate` and `evaluate_files` go over everything once, a block at a time; `EvaluationState` is what they add
up in, for those who bring the batches themselves; `Metrics` is what comes out. Reports are in `report`.
"""

from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.errors import (
    DtypeError,
    EvaluationError,
    FileError,
    LabelError,
    LogitError,
    ShapeError,
    StateError,
)
from logitloss.evaluate.files import evaluate_files
from logitloss.evaluate.metrics import Metrics
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import Evaluation, evaluate
from logitloss.evaluate.vocabulary import VocabularyShards

__all__ = [
    "DtypeError",
    "Evaluation",
    "EvaluationError",
    "EvaluationState",
    "FileError",
    "LabelError",
    "LogitError",
    "Metrics",
    "ShapeError",
    "Skipped",
    "StateError",
    "VocabularyShards",
    "evaluate",
    "evaluate_files",
]
