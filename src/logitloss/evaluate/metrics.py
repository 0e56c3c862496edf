"""The figures of an evaluation: one frozen record, made from sums by `EvaluationState.compute`.

Every figure that follows from another (bits and perplexity from nats) is worked out here, once. How they look
is left to `report.py`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, NotRequired, TypedDict, cast

from logitloss.evaluate.calibration import Bin

Loss = Literal["ce", "bce"]


class MetricsDict(TypedDict):
    """What `Metrics.to_dict` returns."""

    loss: str
    count: int
    ignored: int
    infinite: int
    nll_nats: float
    nll_bits: float
    nll_nats_standard_error: float
    nll_bits_standard_error: float
    perplexity: float
    accuracy: float
    accuracy_standard_error: float
    brier: NotRequired[float]
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


@dataclass(frozen=True, slots=True)
class BinaryMetrics:
    """What is known of binary labels beside their loss.

    Parameters
    ----------
    brier : float
        Mean of (probability - label)**2.
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
    ignored : int
        Labels equal to `ignore_index`.
    infinite : int
        Labels that counted and whose loss is infinite: a logit of -inf at the target. One is enough to make
        the mean infinite.
    nll_nats : float
        Mean negative log-likelihood over the labels that counted, in nats; NaN if none did.
    nll_nats_standard_error : float
        Standard error of that mean, in nats, with the labels taken as independent; NaN below two.
    accuracy : float
        Share of the labels that counted which the largest logit gets right (the first of equals; with "bce",
        a logit above 0 where the target is above 1/2).
    binary : BinaryMetrics, optional
        Further figures of loss "bce".
    n_bytes, n_words : int, optional
        Of the text whose tokens counted; they make figures that do not depend on the tokenizer.
    """

    loss: Loss
    count: int
    ignored: int
    infinite: int
    nll_nats: float
    nll_nats_standard_error: float
    accuracy: float
    binary: BinaryMetrics | None = None
    n_bytes: int | None = None
    n_words: int | None = None

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
        """Standard error of the accuracy, from the unbiased variance of hits; NaN below two labels."""
        if self.count < 2:
            return math.nan
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / (self.count - 1))

    def to_dict(self) -> MetricsDict:
        """Every figure under its name, derived ones too; those per byte and per word if there are any."""
        figures: MetricsDict = {
            "loss": self.loss,
            "count": self.count,
            "ignored": self.ignored,
            "infinite": self.infinite,
            "nll_nats": self.nll_nats,
            "nll_bits": self.nll_bits,
            "nll_nats_standard_error": self.nll_nats_standard_error,
            "nll_bits_standard_error": self.nll_bits_standard_error,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "accuracy_standard_error": self.accuracy_standard_error,
        }
        if self.binary is not None:
            figures |= cast(MetricsDict, asdict(self.binary))
        if self.n_bytes is not None:
            figures["bytes"] = self.n_bytes
            figures["bits_per_byte"] = self.bits_per_byte
            figures["perplexity_per_byte"] = self.perplexity_per_byte
        if self.n_words is not None:
            figures["words"] = self.n_words
            figures["perplexity_per_word"] = self.perplexity_per_word
        return figures


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
