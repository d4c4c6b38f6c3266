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

from neat_kernels.finetune.defaults import HEAD_LEARNING_RATE
from neat_kernels.finetune.files import write_atomically
from neat_kernels.finetune.train import MethodResult

CURVES = "curves.png"
RESULTS = "results.json"
FORMAT = 1

# Okabe and Ito's colours, told apart by readers who are colour-blind.
COLORS = {"probe": "#7f7f7f", "lora": "#0072B2", "neat": "#D55E00", "full": "#009E73"}
LABELS = {"probe": "linear probe", "lora": "LoRA", "neat": "Neat", "full": "full"}
SMOOTHING_SHARE = 0.05


def results_table(results: Sequence[MethodResult]) -> Table:
    """One row for each method: accuracy on the test split, parameters, time and memory.

    Args:
        results: the measured methods.

    Returns:
        A table for the terminal.
    """
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Accuracy on {len(results[0].test_right):,} test texts",
        caption="± is the 95 % interval of one accuracy, as far as it is the texts' doing.\n"
        f"trainable: parameters, of which {results[0].head:,} are the head's.\n"
        f"lr: of what trains in the model; the head beside it has {HEAD_LEARNING_RATE:g}.\n"
        "peak MiB: the most memory that weights, optimizer state, activations and\n"
        "gradients held at one time, in the step with the largest batch.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    several = any(len(result.seeds) > 1 for result in results)
    for column in ("accuracy", *(("seeds",) if several else ()), "trainable", "lr", "ms/step", "tokens/s", "peak MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            LABELS[result.method],
            f"{100 * result.test_accuracy:.1f} ± {100 * half_width(result.test_right):.1f} %",
            *((over_seeds(result),) if several else ()),
            f"{result.trainable:,}",
            f"{result.lr:g}",
            dash_if_unknown(result.step_ms, ".0f"),
            dash_if_unknown(result.tokens_per_second, ",.0f"),
            "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
        )
    return table


def over_seeds(result: MethodResult) -> str:
    """How many seeds there were, and the standard deviation of their accuracies in points."""
    if len(result.seeds) < 2:
        return "1"
    return f"{len(result.seeds)}, σ {100 * statistics.stdev(result.accuracies):.1f}"


def rates_tried(results: Sequence[MethodResult]) -> list[str]:
    """For each method the validation accuracy that each learning rate of the grid has reached."""
    lines = []
    for result in results:
        if result.grid:
            tried = ", ".join(
                f"{rate:g}: " + ("not finite" if accuracy is None else f"{accuracy:.1%}")
                for rate, accuracy in result.grid
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
        points = 100 * (neat.test_accuracy - other.test_accuracy)
        width = 100 * half_width(differences(neat, other))
        verdict = "within what chance explains" if abs(points) <= width else "more than chance explains"
        lines.append(f"Neat against {LABELS[other.method]}: {points:+.1f} ± {width:.1f} points, {verdict}")
    return lines


def differences(one: MethodResult, other: MethodResult) -> list[float]:
    """For each test text 1 if only `one` gets it right, -1 if only `other` does, else 0; means over the seeds."""
    return [a - b for a, b in zip(one.test_right, other.test_right, strict=True)]


def dash_if_unknown(value: float, form: str) -> str:
    """The number in the given form, or a dash if it was not measured."""
    return "–" if math.isnan(value) else format(value, form)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of values measured on as many texts."""
    return 1.96 * statistics.pstdev(values) / math.sqrt(len(values))


def results_json(path: Path, facts: dict[str, Any], results: Sequence[MethodResult]) -> None:
    """Write everything that was measured, with what it was measured on."""
    methods = []
    for result in results:
        values = {name: None if is_nan(value) else value for name, value in asdict(result).items()}
        del values["test_right"]
        values["test_accuracy"] = result.test_accuracy
        values["test_accuracy_half_width_95"] = half_width(result.test_right)
        methods.append(values)
    content = {"format": FORMAT, **facts, "methods": methods, "comparisons": comparisons(results)}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def is_nan(value: object) -> bool:
    """Whether the value is a float that was not measured."""
    return isinstance(value, float) and math.isnan(value)


def draw_curves(path: Path, results: Sequence[MethodResult], title: str) -> None:
    """Draw training loss, validation accuracy and final test accuracy of each method into a PNG.

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
    for result in results:
        draw_loss(loss, result)
        steps, accuracies = zip(*result.validation, strict=True)
        percent = [100 * accuracy for accuracy in accuracies]
        validation.plot(steps, percent, "o-", color=COLORS[result.method], label=LABELS[result.method], markersize=4)
    label_axes(loss, "Training loss", "step", "cross-entropy")
    label_axes(validation, "Validation accuracy", "step", "accuracy (%)")
    loss.legend(frameon=False)
    draw_test(test, results)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def draw_loss(axes: Any, result: MethodResult) -> None:
    """Draw the loss of each step faintly, and its running mean."""
    steps = range(1, len(result.losses) + 1)
    color = COLORS[result.method]
    axes.plot(steps, result.losses, color=color, alpha=0.2, linewidth=0.8)
    axes.plot(steps, running_mean(result.losses), color=color, label=LABELS[result.method], linewidth=1.8)


def draw_test(axes: Any, results: Sequence[MethodResult]) -> None:
    """Draw the final test accuracies as bars with their 95 % intervals."""
    for position, result in enumerate(results):
        accuracy, width = 100 * result.test_accuracy, 100 * half_width(result.test_right)
        axes.bar(position, accuracy, 0.65, yerr=width, capsize=4, color=COLORS[result.method], ecolor="#333333")
        axes.text(position, accuracy + width + 1, f"{accuracy:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(results)), [LABELS[result.method] for result in results])
    axes.set_ylim(0, 105)
    label_axes(axes, f"Test accuracy, {len(results[0].test_right):,} texts", "", "accuracy (%)")


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
