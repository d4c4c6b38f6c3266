"""What a task is measured by on texts that were not trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One number for a split: the mean over its texts, each with a weight.

    Args:
        name: in words.
        of_seeds: what results.json calls the values of all seeds on the test split.
        axis: its name and unit in a picture.
        difference: what a difference of two values is called.
        difference_digits: decimals of a difference that is shown.
        lower_is_better: whether the least value is the best one.
        scale: factor of a value that is shown.
        digits: decimals of a value that is shown.
        suffix: its unit in a table.
        brief: format of a value inside a line.
        perplexity: whether the exponential of a value means something, and is shown beside it.
    """

    name: str
    of_seeds: str
    axis: str
    difference: str
    difference_digits: int
    lower_is_better: bool
    scale: float
    digits: int
    suffix: str
    brief: str
    perplexity: bool = False

    def merit(self, value: float) -> float:
        """A number that is larger for a better value, and the least one for a value that is none."""
        if math.isnan(value):
            return -math.inf
        return -value if self.lower_is_better else value

    def shown(self, value: float) -> str:
        """A value, or half an interval of values, as tables and pictures have it, without its unit."""
        return f"{self.scale * value:.{self.digits}f}"

    def told(self, value: float) -> str:
        """A value as a line has it, with its unit."""
        text = format(value, self.brief)
        return f"{text} (perplexity {perplexity(value):.4g})" if self.perplexity else text


ACCURACY = Measure(
    name="accuracy",
    of_seeds="accuracies",
    axis="accuracy (%)",
    difference="points",
    difference_digits=1,
    lower_is_better=False,
    scale=100.0,
    digits=1,
    suffix=" %",
    brief=".1%",
)
LOSS = Measure(
    name="loss",
    of_seeds="test_losses",
    axis="loss (nats per token)",
    difference="nats per token",
    difference_digits=4,
    lower_is_better=True,
    scale=1.0,
    digits=3,
    suffix="",
    brief=".4f",
    perplexity=True,
)
MEASURES = {measure.name: measure for measure in (ACCURACY, LOSS)}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where float64 cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def mean(values: Sequence[float], weights: Sequence[float] = ()) -> float:
    """The mean of the values; without weights all count alike."""
    if not weights:
        return statistics.fmean(values)
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def half_width(values: Sequence[float], weights: Sequence[float] = ()) -> float:
    """Half of the 95 % interval of the mean of values measured on as many texts.

    With weights the mean is a ratio of two sums, m = Σ wᵢ·vᵢ / Σ wᵢ, whose deviation is, to first order, that of the
    mean of wᵢ·(vᵢ - m) / w̄.
    """
    if weights:
        middle, weight = mean(values, weights), statistics.fmean(weights)
        values = [w * (v - middle) / weight for w, v in zip(weights, values, strict=True)]
    return 1.96 * statistics.pstdev(values) / math.sqrt(len(values))
