"""The results of a run: a table, a picture and a file of numbers."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from neat_kernels.files import write_atomically
from neat_kernels.finetune.defaults import HEAD_LEARNING_RATE
from neat_kernels.finetune.measure import Measure, half_width, perplexity
from neat_kernels.finetune.train import MethodResult

CURVES = "curves.png"
RESULTS = "results.json"
FORMAT = 1

# Okabe and Ito's colours, told apart by readers who are colour-blind.
COLORS = {"probe": "#7f7f7f", "lora": "#0072B2", "neat": "#D55E00", "full": "#009E73"}
LABELS = {"probe": "linear probe", "lora": "LoRA", "neat": "Neat", "full": "full"}
SMOOTHING_SHARE = 0.05


def results_table(results: Sequence[MethodResult]) -> Table:
    """One row for each method: its measure on the test split, parameters, time and memory.

    Args:
        results: the measured methods.

    Returns:
        A table for the terminal.
    """
    measure = results[0].measured_by
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"{measure.name.capitalize()} on {len(results[0].test_values):,} test texts",
        caption=caption(results[0]),
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    several = any(len(result.seeds) > 1 for result in results)
    for column in (
        measure.name,
        *(("seeds",) if several else ()),
        "trainable",
        "lr",
        "ms/step",
        "tokens/s",
        "peak MiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            LABELS[result.method],
            f"{measure.shown(result.test_score)} ± {measure.shown(interval(result))}{measure.suffix}",
            *((over_seeds(result),) if several else ()),
            f"{result.trainable:,}",
            f"{result.lr:g}",
            dash_if_unknown(result.step_ms, ".0f"),
            dash_if_unknown(result.tokens_per_second, ",.0f"),
            "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
        )
    return table


def caption(result: MethodResult) -> str:
    """What the columns of the table mean."""
    measure = result.measured_by
    head = f", of which {result.head:,} are the head's" if result.head else ""
    unit = f"{measure.name}: {measure.difference}, of the tokens that are learned.\n" if measure.perplexity else ""
    rate = f"lr: of what trains in the model; the head beside it has {HEAD_LEARNING_RATE:g}.\n" if result.head else ""
    return (
        f"{unit}± is the 95 % interval of one {measure.name}, as far as it is the texts' doing.\n"
        f"trainable: parameters{head}.\n"
        f"{rate}"
        "peak MiB: the most memory that weights, optimizer state, activations\n"
        "and gradients held at one time, in the step with the largest batch."
    )


def interval(result: MethodResult) -> float:
    """Half of the 95 % interval of the measure on the test split."""
    return half_width(result.test_values, result.test_weights)


def over_seeds(result: MethodResult) -> str:
    """How many seeds there were, and the standard deviation of their values on the test split."""
    if len(result.seeds) < 2:
        return "1"
    return f"{len(result.seeds)}, σ {result.measured_by.shown(statistics.stdev(result.test_scores))}"


def perplexities(results: Sequence[MethodResult]) -> list[str]:
    """The perplexity of each method on the test split, for a measure of which it is the exponential."""
    if not results[0].measured_by.perplexity:
        return []
    told = ", ".join(f"{LABELS[result.method]} {perplexity(result.test_score):.4g}" for result in results)
    return [f"Perplexity, the exponential of the loss: {told}"]


def rates_tried(results: Sequence[MethodResult]) -> list[str]:
    """For each method what each learning rate of the grid has reached in validation."""
    lines = []
    for result in results:
        if result.grid:
            tried = ", ".join(
                f"{rate:g}: " + ("not finite" if value is None else result.measured_by.told(value))
                for rate, value in result.grid
            )
            lines.append(f"{LABELS[result.method]} in validation at lr {tried}; chosen {result.lr:g}")
    return lines


def comparisons(results: Sequence[MethodResult]) -> list[str]:
    """Where Neat stands to each other method, judged on the same test texts; nothing if Neat did not run.

    Args:
        results: the measured methods.

    Returns:
        One line for each other method, with the 95 % interval of the paired difference.
    """
    neat = next((result for result in results if result.method == "neat"), None)
    others = [result for result in results if result is not neat] if neat else []
    lines = []
    for other in others:
        assert neat is not None
        measure = neat.measured_by
        points = measure.scale * (neat.test_score - other.test_score)
        width = measure.scale * half_width(differences(neat, other), neat.test_weights)
        verdict = "within what chance explains" if abs(points) <= width else "more than chance explains"
        unit = f"{measure.difference}{' (less is better)' if measure.lower_is_better else ''}"
        digits = measure.difference_digits
        told = f"{points:+.{digits}f} ± {width:.{digits}f} {unit}, {verdict}"
        lines.append(f"Neat against {LABELS[other.method]}: {told}")
    return lines


def differences(one: MethodResult, other: MethodResult) -> list[float]:
    """For each test text what `one` has more than `other`; of accuracy 1 if only `one` gets it right, or -1, or 0."""
    return [a - b for a, b in zip(one.test_values, other.test_values, strict=True)]


def dash_if_unknown(value: float, form: str) -> str:
    """The number in the given form, or a dash if it was not measured."""
    return "–" if math.isnan(value) else format(value, form)


def results_json(path: Path, facts: dict[str, Any], results: Sequence[MethodResult]) -> None:
    """Write everything that was measured, with what it was measured on."""
    methods = []
    for result in results:
        values = {name: None if is_nan(value) else value for name, value in asdict(result).items()}
        for name in ("test_values", "test_weights"):
            del values[name]
        measure = result.measured_by
        values[measure.of_seeds] = values.pop("test_scores")
        values[f"test_{measure.name}"] = result.test_score
        values[f"test_{measure.name}_half_width_95"] = interval(result)
        if measure.perplexity and math.isfinite(perplexity(result.test_score)):
            values["test_perplexity"] = perplexity(result.test_score)
        methods.append(values)
    content = {"format": FORMAT, **facts, "methods": methods, "comparisons": comparisons(results)}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def is_nan(value: object) -> bool:
    """Whether the value is a float that was not measured."""
    return isinstance(value, float) and math.isnan(value)


def draw_curves(path: Path, results: Sequence[MethodResult], title: str) -> None:
    """Draw training loss, and the measure in validation and at the end on the test split, of each method into a PNG.

    Args:
        path: the file to write.
        results: the measured methods.
        title: what was trained on what.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    loss, validation, test = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    figure.suptitle(title)
    measure = results[0].measured_by
    for result in results:
        draw_loss(loss, result)
        steps, values = zip(*result.validation, strict=True)
        scaled = [measure.scale * value for value in values]
        validation.plot(steps, scaled, "o-", color=COLORS[result.method], label=LABELS[result.method], markersize=4)
    label_axes(loss, "Training loss", "step", "cross-entropy")
    label_axes(validation, f"Validation {measure.name}", "step", measure.axis)
    loss.legend(frameon=False)
    draw_test(test, results, measure)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def draw_loss(axes: Any, result: MethodResult) -> None:
    """Draw the loss of each step faintly, and its running mean."""
    steps = range(1, len(result.losses) + 1)
    color = COLORS[result.method]
    axes.plot(steps, result.losses, color=color, alpha=0.2, linewidth=0.8)
    axes.plot(steps, running_mean(result.losses), color=color, label=LABELS[result.method], linewidth=1.8)


def draw_test(axes: Any, results: Sequence[MethodResult], measure: Measure) -> None:
    """Draw the final values on the test split as bars with their 95 % intervals."""
    tops = []
    for position, result in enumerate(results):
        value, width = measure.scale * result.test_score, measure.scale * interval(result)
        tops.append(value + width)
        axes.bar(position, value, 0.65, yerr=width, capsize=4, color=COLORS[result.method], ecolor="#333333")
        axes.annotate(
            measure.shown(result.test_score), (position, value + width), (0, 3), textcoords="offset points",
            ha="center", va="bottom",
        )  # fmt: skip
    axes.set_xticks(range(len(results)), [LABELS[result.method] for result in results])
    axes.set_ylim(0, 1.15 * max(tops) if measure.lower_is_better else 105)
    title = f"Test {measure.name}, {len(results[0].test_values):,} texts"
    label_axes(axes, title, "", measure.axis)


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    """Give the axes their words, and no more lines than they need."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the last values up to each one, over a share of the whole."""
    span = max(1, round(SMOOTHING_SHARE * len(values)))
    return [sum(values[max(0, end - span) : end]) / min(end, span) for end in range(1, len(values) + 1)]
