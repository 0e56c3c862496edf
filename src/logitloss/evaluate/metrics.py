"""The figures of an evaluation: one frozen record, made from sums by `EvaluationState.compute`.

Every figure that follows from another (bits and perplexity from nats) is worked out here, once. How they look
is left to `report.py`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, NotRequired, TypedDict, cast

from logitloss.evaluate.calibration import Bin
from logitloss.evaluate.histogram import LossBin

Loss = Literal["ce", "bce"]


class TopK(TypedDict):
    """Share of the labels that are among the k largest logits."""

    k: int
    accuracy: float
    accuracy_standard_error: float


# "class" is no name that Python allows
ClassLine = TypedDict(
    "ClassLine", {"class": int, "count": int, "predicted": int, "nll_nats": float, "accuracy": float}
)


class Confusion(TypedDict):
    """How often labels of one class were taken for another."""

    label: int
    predicted: int
    count: int


class MetricsDict(TypedDict):
    """What `Metrics.to_dict` returns."""

    loss: str
    count: int
    ignored: int
    masked: int
    shifted: int
    infinite: int
    nll_nats: float
    nll_bits: float
    nll_nats_standard_error: float
    nll_bits_standard_error: float
    nll_histogram: list[LossBin]
    perplexity: float
    accuracy: float
    accuracy_standard_error: float
    top_k: NotRequired[list[TopK]]
    accuracy_by_rank: NotRequired[list[float]]
    mean_reciprocal_rank: NotRequired[float]
    mean_reciprocal_rank_standard_error: NotRequired[float]
    brier: NotRequired[float]
    brier_standard_error: NotRequired[float]
    entropy_nats: NotRequired[float]
    entropy_nats_standard_error: NotRequired[float]
    confidence: NotRequired[float]
    confidence_standard_error: NotRequired[float]
    expected_calibration_error: NotRequired[float]
    maximum_calibration_error: NotRequired[float]
    calibration: NotRequired[list[Bin]]
    roc_auc: NotRequired[float]
    roc_auc_error_bound: NotRequired[float]
    average_precision: NotRequired[float]
    average_precision_error_bound: NotRequired[float]
    bytes: NotRequired[int]
    bits_per_byte: NotRequired[float]
    perplexity_per_byte: NotRequired[float]
    words: NotRequired[int]
    perplexity_per_word: NotRequired[float]
    per_class: NotRequired[list[ClassLine]]
    confusions: NotRequired[list[Confusion]]


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """What is known of classes beside their loss.

    Parameters
    ----------
    top_k : list of dict
        The share of labels among the k largest logits, for some k; of equals the first is the larger.
    accuracy_by_rank : list of float
        The same for every k from 1 on, up to the number of classes or 100; empty if nothing counted.
    mean_reciprocal_rank : float
        Mean of 1 / rank, where the largest logit has rank 1.
    brier : float
        Mean of sum_c (p_c - [c is the label])**2, between 0 and 2.
    entropy_nats : float
        Mean of the entropy -sum_c p_c log p_c, in nats.
    confidence : float
        Mean of the largest probability.
    mean_reciprocal_rank_standard_error, brier_standard_error, entropy_nats_standard_error, \
confidence_standard_error : float
        Those of the means.
    expected_calibration_error, maximum_calibration_error : float
        Of 15 equal bins of the largest probability: the mean gap to the accuracy, and the largest gap.
    calibration : list of dict
        The bins.
    """

    top_k: list[TopK]
    accuracy_by_rank: list[float]
    mean_reciprocal_rank: float
    mean_reciprocal_rank_standard_error: float
    brier: float
    brier_standard_error: float
    entropy_nats: float
    entropy_nats_standard_error: float
    confidence: float
    confidence_standard_error: float
    expected_calibration_error: float
    maximum_calibration_error: float
    calibration: list[Bin]


@dataclass(frozen=True, slots=True)
class BinaryMetrics:
    """What is known of binary labels beside their loss.

    Parameters
    ----------
    brier, brier_standard_error : float
        Mean of (probability - label)**2, and its standard error.
    expected_calibration_error, maximum_calibration_error : float
        Of 15 equal bins of the probability: the mean gap between probability and label, and the largest.
    calibration : list of dict
        The bins.
    roc_auc, average_precision : float
        How well logits rank labels above 1/2 above the others; NaN where there are none of a kind.
    roc_auc_error_bound, average_precision_error_bound : float
        How far the exact figures may be at most, since logits are ranked in bins of 2**-10.
    """

    brier: float
    brier_standard_error: float
    expected_calibration_error: float
    maximum_calibration_error: float
    calibration: list[Bin]
    roc_auc: float
    roc_auc_error_bound: float
    average_precision: float
    average_precision_error_bound: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """What an evaluation found.

    Parameters
    ----------
    loss : {"ce", "bce"}
        Softmax cross-entropy (a label a row) or binary cross-entropy (a label a logit).
    count : int
        Labels that counted.
    ignored, masked, shifted : int
        Labels that did not: equal to `ignore_index`; left out by the mask, whatever they are; or with no
        logits before them to predict them, the first of each sequence that is shifted. Each has one reason,
        the last of these that holds. Of groups, those shifted are not told.
    infinite : int
        Labels that counted and whose loss is infinite: a logit of -inf at the target. One is enough to make
        the mean infinite. Labels without a loss, of rows that hold NaN or +inf, are errors.
    nll_nats : float
        Mean negative log-likelihood over the labels that counted, in nats; NaN if none did.
    nll_nats_standard_error : float
        Standard error of that mean, in nats, with the labels taken as independent; NaN below two.
    nll_histogram : list of dict
        Counts of the labels by their loss: bins from `low` nats on and below `high`, four to each power of
        two from 2**-20 to 2**10, and one at either end. Those that hold something.
    accuracy : float
        Share of the labels that counted which the largest logit gets right (the first of equals; with "bce",
        a logit above 0 where the target is above 1/2).
    classes : ClassMetrics, optional
        Further figures of loss "ce", rows of infinite loss included; None if some rows came without them.
    binary : BinaryMetrics, optional
        Further figures of loss "bce".
    per_class : list of dict, optional
        For each class, where asked for: how many labels, predictions, mean loss in nats, share of hits.
    confusions : list of dict, optional
        Beside `per_class`, of up to 1024 classes: pairs of label and another class that was predicted, and
        how often; the 100 that came up most, the first those that did most.
    n_bytes, n_words : int, optional
        Of the text whose tokens counted; they make figures that do not depend on the tokenizer.
    warnings : tuple of str
        What makes the figures doubtful: labels that counted and look like padding.
    """

    loss: Loss
    count: int
    ignored: int
    masked: int
    shifted: int
    infinite: int
    nll_nats: float
    nll_nats_standard_error: float
    nll_histogram: list[LossBin]
    accuracy: float
    classes: ClassMetrics | None = None
    binary: BinaryMetrics | None = None
    per_class: list[ClassLine] | None = None
    confusions: list[Confusion] | None = None
    n_bytes: int | None = None
    n_words: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def nll_bits(self) -> float:
        """Mean negative log-likelihood in bits."""
        return self.nll_nats / math.log(2.0)

    @property
    def nll_bits_standard_error(self) -> float:
        """Standard error of the mean in bits."""
        return self.nll_nats_standard_error / math.log(2.0)

    @property
    def perplexity(self) -> float:
        """exp(nll_nats): per label; infinite where that exceeds float64."""
        return _exp(self.nll_nats)

    def nats_per(self, number: int | None) -> float:
        """Negative log-likelihood of all labels, in nats, by a number of other units; NaN of none."""
        return self.nll_nats * self.count / number if number else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood of the text by its bytes, in bits; NaN if they were not given."""
        return self.nats_per(self.n_bytes) / math.log(2.0)

    @property
    def perplexity_per_byte(self) -> float:
        """Perplexity by byte in place of label."""
        return _exp(self.nats_per(self.n_bytes))

    @property
    def perplexity_per_word(self) -> float:
        """Perplexity by word in place of label."""
        return _exp(self.nats_per(self.n_words))

    @property
    def accuracy_standard_error(self) -> float:
        """Standard error of the accuracy; NaN below two labels."""
        return share_error(self.accuracy, self.count)

    def to_dict(self) -> MetricsDict:
        """Every figure under its name, derived ones too; those per byte and per word if there are any."""
        figures: MetricsDict = {
            "loss": self.loss,
            "count": self.count,
            "ignored": self.ignored,
            "masked": self.masked,
            "shifted": self.shifted,
            "infinite": self.infinite,
            "nll_nats": self.nll_nats,
            "nll_bits": self.nll_bits,
            "nll_nats_standard_error": self.nll_nats_standard_error,
            "nll_bits_standard_error": self.nll_bits_standard_error,
            "nll_histogram": self.nll_histogram,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "accuracy_standard_error": self.accuracy_standard_error,
        }
        for further in (self.classes, self.binary):
            if further is not None:
                figures |= cast(MetricsDict, asdict(further))
        if self.n_bytes is not None:
            figures["bytes"] = self.n_bytes
            figures["bits_per_byte"] = self.bits_per_byte
            figures["perplexity_per_byte"] = self.perplexity_per_byte
        if self.n_words is not None:
            figures["words"] = self.n_words
            figures["perplexity_per_word"] = self.perplexity_per_word
        if self.per_class is not None:
            figures["per_class"] = self.per_class
        if self.confusions is not None:
            figures["confusions"] = self.confusions
        return figures


def share_error(share: float, count: int) -> float:
    """Return the standard error of a share, from the unbiased variance of zeros and ones; NaN below two."""
    return math.sqrt(share * (1.0 - share) / (count - 1)) if count > 1 else math.nan


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
