"""Offline evaluation: what a model's logits, in files, arrays or batches, are worth against the labels.

`evaluate` (of all these) and `evaluate_files` (with hidden states, shards that may fail and what was read) go
over everything once, a block at a time; `EvaluationState` is what they add up in; `Metrics` is what comes
out. Reports are in `report`, their pages in `page`, how two of them differ in `compare`, pictures for
matplotlib in `plot`, and the formats of files in `stores`.
"""

from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.errors import (
    DtypeError,
    EvaluationError,
    FileError,
    FileWarning,
    LabelError,
    LogitError,
    MaskError,
    ShapeError,
    StateError,
)
from logitloss.evaluate.files import evaluate_files
from logitloss.evaluate.inputs import evaluate
from logitloss.evaluate.metrics import Metrics
from logitloss.evaluate.padding import PaddingWarning
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import Evaluation
from logitloss.evaluate.vocabulary import VocabularyShards

__all__ = [
    "DtypeError",
    "Evaluation",
    "EvaluationError",
    "EvaluationState",
    "FileError",
    "FileWarning",
    "LabelError",
    "LogitError",
    "MaskError",
    "Metrics",
    "PaddingWarning",
    "ShapeError",
    "Skipped",
    "StateError",
    "VocabularyShards",
    "evaluate",
    "evaluate_files",
]
