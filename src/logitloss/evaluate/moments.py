"""Count, sum and spread of a stream of numbers, the same however the stream is cut.

`Compensated` is a float64 sum that carries its rounding error in a second float64 (Knuth's two-sum), so the
number of additions does not show in the result; `Sums` are many side by side. `Moments` keeps the sum and the
squared deviations from the mean, and joins two of them by Chan's formula: squares of raw values would lose
the spread where the mean is large against it. What the numbers mean is left to `state.py`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Numbers that may be added up plainly before `Sums` has them, so that rounding stays below 1e-12
PLAIN = 1 << 14


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a + b rounded, and what rounding took (Knuth)."""
    total = a + b
    rounded = total - a
    return total, (a - (total - rounded)) + (b - rounded)


@dataclass(slots=True)
class Compensated:
    """A float64 sum and the rounding error it has made so far."""

    high: float = 0.0
    low: float = 0.0

    def add(self, value: float) -> None:
        """Add one number."""
        self.high, error = two_sum(self.high, value)
        self.low += error

    def merge(self, other: "Compensated") -> None:
        """Add another sum, error included."""
        self.add(other.high)
        self.low += other.low

    def to_list(self) -> list[Any]:
        """Both numbers, for JSON."""
        return [json_number(self.high), json_number(self.low)]

    @classmethod
    def from_list(cls, numbers: list[Any]) -> "Compensated":
        """Read what `to_list` wrote."""
        high, low = numbers
        return cls(float(high), float(low))

    @property
    def value(self) -> float:
        """The sum; one that has overflowed is infinite, and its error means nothing."""
        return self.high + self.low if math.isfinite(self.high) else self.high


@dataclass(slots=True)
class Sums:
    """Compensated sums side by side, of as many things."""

    high: Float64
    low: Float64

    @classmethod
    def zeros(cls, n: int) -> "Sums":
        """Return n sums of nothing."""
        return cls(np.zeros(n), np.zeros(n))

    def add(self, values: Float64) -> None:
        """Add a number to each."""
        self.high, error = two_sum(self.high, values)
        self.low += error

    def merge(self, other: "Sums") -> None:
        """Add other sums, errors included."""
        self.add(other.high)
        self.low += other.low

    def to_list(self) -> list[Any]:
        """Both numbers of all, for JSON."""
        return [[json_number(value) for value in part.tolist()] for part in (self.high, self.low)]

    @classmethod
    def from_list(cls, numbers: list[Any]) -> "Sums":
        """Read what `to_list` wrote."""
        high, low = (np.array([float(value) for value in part]) for part in numbers)
        if high.shape != low.shape:
            raise ValueError(f"{high.size} sums with the errors of {low.size}")
        return cls(high, low)

    @property
    def values(self) -> Float64:
        """The sums; one that is infinite has an error that means nothing."""
        return np.where(np.isfinite(self.high), self.high + self.low, self.high)


@dataclass(slots=True)
class Moments:
    """How many numbers, their sum, and the sum of their squared deviations from the mean."""

    count: int = 0
    total: Compensated = field(default_factory=Compensated)
    deviations: Compensated = field(default_factory=Compensated)

    @classmethod
    def of(cls, values: Float64) -> "Moments":
        """Moments of one block."""
        return cls.of_each(values[None])[0]

    @classmethod
    def of_each(cls, values: Float64) -> "list[Moments]":
        """Moments of each row of a block; NumPy sums in pairs, so its rounding stays in the last digits."""
        count = values.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            totals = values.sum(axis=1)
            around = values - totals[:, None] / max(1, count)
            np.multiply(around, around, out=around)
            pairs = zip(totals.tolist(), around.sum(axis=1).tolist(), strict=True)
        return [cls(count, Compensated(total), Compensated(deviations)) for total, deviations in pairs]

    def merge(self, other: "Moments") -> None:
        """Take in the numbers that `other` has seen."""
        if self.count and other.count:
            gap = other.mean - self.mean
            self.deviations.add(gap * gap * (self.count / (self.count + other.count)) * other.count)
        self.count += other.count
        self.total.merge(other.total)
        self.deviations.merge(other.deviations)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "count": self.count,
            "total": self.total.to_list(),
            "deviations": self.deviations.to_list(),
        }

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> "Moments":
        """Read what `to_dict` wrote."""
        total, deviations = (Compensated.from_list(numbers[name]) for name in ("total", "deviations"))
        if deviations.value < 0:
            raise ValueError(f"squared deviations of {deviations.value}")
        return cls(whole_number(numbers["count"]), total, deviations)

    @property
    def mean(self) -> float:
        """The arithmetic mean; NaN of nothing."""
        return self.total.value / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, from the unbiased variance; NaN below two numbers."""
        if self.count < 2:
            return math.nan
        return math.sqrt(self.deviations.value / (self.count - 1) / self.count)


def json_number(value: object) -> object:
    """Return a float as JSON has it: Infinity and NaN as strings, as Protocol Buffers' JSON mapping does.

    Python's `float` reads them back. What is no float is returned as it is.
    """
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def whole_number(value: object) -> int:
    """Return a count read from JSON."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def counts_of(saved: list[object]) -> Int64:
    """Return a list of counts read from JSON."""
    return np.array([whole_number(value) for value in saved], np.int64)
