"""`neat-kernels plot`: result files as pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from neat_kernels.bench.contenders import BASELINE, CONTENDERS
from neat_kernels.bench.measure import LABELS
from neat_kernels.bench.model_results import label, read_model_results
from neat_kernels.bench.results import Case, read_results
from neat_kernels.bench.roofline import Roofline, read_roofline
from neat_kernels.bench.shapes import LayerShape
from neat_kernels.files import write_atomically

# Okabe and Ito's colours, told apart by readers who are colour-blind; what differs in the adapter's dtype alone, or in
# being compiled, is dashed.
_STYLES = {
    "frozen": ("#000000", "-"),
    "neat": ("#D55E00", "-"),
    "neat_half": ("#D55E00", "--"),
    "accelerated": ("#E69F00", "-"),
    "peft_neat": ("#E69F00", "--"),
    "neat_lora": ("#CC79A7", "-"),
    "peft_lora": ("#0072B2", "-"),
    "peft_lora_half": ("#0072B2", "--"),
    "peft_peanut": ("#009E73", "-"),
    "formula": ("#56B4E9", "-"),
    "formula_compiled": ("#56B4E9", "--"),
    "lora_by_hand": ("#7f7f7f", "-"),
    "unsloth_lora": ("#7f7f7f", "--"),
}
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*XhH"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Draw = Callable[[Any], None]


def pictures(paths: Sequence[Path]) -> dict[str, Draw]:
    """The pictures that result files give, each by the end of its name.

    Args:
        paths: one result file of `neat-kernels bench`, benchmarks.layer_ratio or benchmarks.model_step; or files of
            benchmarks.kernel_times.

    Returns:
        Functions that draw onto a figure.

    Raises:
        ValueError: a file is none of these, or several are given of a kind that takes one.
    """
    kind = _kind(paths[0])
    if kind == "kernels":
        roofline = read_roofline(paths)
        return {"roofline": lambda figure: draw_roofline(figure, roofline)}
    if len(paths) > 1:
        raise ValueError(f"expected one file, or several of benchmarks.kernel_times; got {len(paths)}")
    if kind == "model":
        content = read_model_results(paths[0])
        return {"model": lambda figure: draw_model(figure, content)}
    return _of_layers(read_results(paths[0]).cases)


def _kind(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a result file in JSON, got {error}") from error
    if isinstance(content, dict) and "ceilings" in content:
        return "kernels"
    return "model" if isinstance(content, dict) and "targets" in content else "layers"


def write_picture(path: Path, draw: Draw, sources: Sequence[Path] = ()) -> None:
    """Draw into an SVG or PNG file, with the digest of the files that it was made from in an SVG.

    Args:
        path: the file; its suffix tells the format.
        draw: draws onto a figure.
        sources: the result files.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    suffix = path.suffix.removeprefix(".")
    # The same data give the same bytes: no date, no drawn identifiers.
    metadata = {"Date": None, "Description": digest(sources)} if suffix == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "neat-kernels", "svg.fonttype": "none"}):
        draw(figure)
        figure.savefig(image, format=suffix, dpi=150, metadata=metadata)
    write_atomically(path, image.getvalue())


def digest(sources: Iterable[Path]) -> str:
    """What tells one set of result files from another."""
    return f"sha256 {hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()}"


def _of_layers(cases: Sequence[Case]) -> dict[str, Draw]:
    layers = [case for case in cases if not case.get("block")]
    found: dict[str, Draw] = {}
    tokens = _series(layers, lambda shape: (shape.in_features, shape.out_features, shape.r))
    if tokens:
        found["tokens"] = lambda figure: draw_series(figure, tokens, lambda shape: shape.tokens, "tokens M")
    square = [case for case in layers if len({*case["shape"].split("x")[1:3]}) == 1]
    widths = _series(square, lambda shape: (shape.tokens, shape.r))
    if widths:
        found["widths"] = lambda figure: draw_series(figure, widths, lambda shape: shape.in_features, "width, K = N")
    found["ratios"] = lambda figure: draw_bars(figure, cases, _ratio_of, "time / frozen linear")
    if any("peak_bytes" in case["summary"] for case in cases):
        found["memory"] = lambda figure: draw_memory(figure, cases)
    return found


def _series(cases: Iterable[Case], same: Callable[[LayerShape], tuple[int, ...]]) -> list[list[Case]]:
    """Cases that differ in one size only, two and more of them."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        shape = LayerShape.parse(case["shape"])
        groups.setdefault((case["mode"], case["dtype"], case["device"], *same(shape)), []).append(case)
    return [group for group in groups.values() if len({case["shape"] for case in group}) > 1]


def _times(case: Case) -> dict[str, Any]:
    """Under CUDA graphs where there are any: they leave the host's part out."""
    times: dict[str, Any] = case["summary"].get("graphs", case["summary"])
    return times


def _title(case: Case) -> str:
    graphs = ", CUDA graphs" if "graphs" in case["summary"] else ""
    return f"{LABELS[case['mode']]}, {_SHORT[case['dtype']]}{graphs}"


def _style(name: str) -> dict[str, Any]:
    color, line = _STYLES[name]
    marker = _MARKERS[list(CONTENDERS).index(name) % len(_MARKERS)]
    return {"color": color, "linestyle": line, "marker": marker}


def draw_series(figure: Any, groups: Sequence[Sequence[Case]], size: Callable[[LayerShape], int], word: str) -> None:
    """Overhead over the frozen linear against a size, with the range over processes, one panel for each group."""
    figure.set_size_inches(5.5 * min(2, len(groups)), 3.9 * -(-len(groups) // 2))
    panels = figure.subplots(-(-len(groups) // 2), min(2, len(groups)), squeeze=False).flatten()
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, group in zip(panels, groups, strict=False):
        ordered = sorted(group, key=lambda case: size(LayerShape.parse(case["shape"])))
        for name in dict.fromkeys(name for case in ordered for name in _times(case)["ms"] if name != BASELINE):
            have = [case for case in ordered if name in _times(case)["ms"]]
            x = [size(LayerShape.parse(case["shape"])) for case in have]
            spread = [_times(case)["ratios"][f"{name}/{BASELINE}"] for case in have]
            percent = {word: [100 * (one[word] - 1) for one in spread] for word in ("median", "min", "max")}
            axes.plot(x, percent["median"], label=CONTENDERS[name].label, markersize=4, **_style(name))
            axes.fill_between(x, percent["min"], percent["max"], color=_style(name)["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=10)
        first = LayerShape.parse(ordered[0]["shape"])
        rest = f"{first.in_features}→{first.out_features}" if word.startswith("tokens") else f"M={first.tokens}"
        _words(axes, f"{_title(ordered[0])}, {rest}, r={first.r}", word, "overhead over frozen linear, %")
    panels[0].legend(frameon=False, fontsize=8)


def _ratio_of(case: Case, name: str) -> tuple[float, float, float] | None:
    one = _times(case)["ratios"].get(f"{name}/{BASELINE}")
    return None if one is None else (one["median"], one["min"], one["max"])


def draw_bars(
    figure: Any,
    cases: Sequence[Case],
    value: Callable[[Case, str], tuple[float, float, float] | None],
    unit: str,
) -> None:
    """A panel of bars for each case, with the range over processes."""
    figure.set_size_inches(5.2 * min(2, len(cases)), 2.9 * -(-len(cases) // 2))
    panels = figure.subplots(-(-len(cases) // 2), min(2, len(cases)), squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    for axes, case in zip(panels, cases, strict=False):
        drawn = [(name, found) for name in case["summary"]["ms"] if (found := value(case, name)) is not None]
        for i, (name, (middle, low, high)) in enumerate(drawn):
            axes.barh(i, middle, xerr=[[middle - low], [high - middle]], color=_style(name)["color"], capsize=2)
            axes.text(high, i, f" {middle:.3g}", va="center", fontsize=8)
        axes.set_yticks(range(len(drawn)), [CONTENDERS[name].label for name, _ in drawn], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        shape = LayerShape.parse(case["shape"])
        what = f"block of {case['block']}, M={shape.tokens}" if case.get("block") else shape.title
        _words(axes, f"{what}\n{_title(case)}", unit, "")


def draw_memory(figure: Any, cases: Sequence[Case]) -> None:
    """Peak of a call and bytes saved for backward, a panel for each case."""
    have = [case for case in cases if "peak_bytes" in case["summary"]]
    figure.set_size_inches(5.6 * min(2, len(have)), 3.1 * -(-len(have) // 2))
    panels = figure.subplots(-(-len(have) // 2), min(2, len(have)), squeeze=False).flatten()
    for axes in panels[len(have) :]:
        axes.set_visible(False)
    for axes, case in zip(panels, have, strict=False):
        names = list(case["summary"]["peak_bytes"])
        apart = 0.2 if "saved_bytes" in case["summary"] else 0.0
        for offset, kind, color in ((-apart, "peak_bytes", "#0072B2"), (apart, "saved_bytes", "#E69F00")):
            counts = case["summary"].get(kind)
            if counts:
                lengths = [counts[name] / 2**20 for name in names]
                text = {"peak_bytes": "peak of a call", "saved_bytes": "saved for backward"}[kind]
                axes.barh([i + offset for i in range(len(names))], lengths, 0.38, color=color, label=text)
        axes.set_yticks(range(len(names)), [CONTENDERS[name].label for name in names], fontsize=8)
        axes.invert_yaxis()
        shape = LayerShape.parse(case["shape"])
        what = f"block of {case['block']}, M={shape.tokens}" if case.get("block") else shape.title
        _words(axes, f"{what}\n{LABELS[case['mode']]}, {_SHORT[case['dtype']]}", "MiB", "")
    panels[0].legend(frameon=False, fontsize=8)


def draw_model(figure: Any, content: dict[str, Any]) -> None:
    """Step time, with its range over processes, and peak memory of whole models."""
    figure.set_size_inches(10, 0.45 * len(content["summary"]) + 1.6)
    times, memory = figure.subplots(1, 2, sharey=True)
    what = f"{content['model']}, {content['targets']}, r={content['r']}"
    figure.suptitle(f"{what}, {content['tokens']} tokens, {_SHORT[content['dtype']]}", fontsize=11)
    names = list(content["summary"])
    for i, one in enumerate(content["summary"].values()):
        error = [[one["ms"] - one["min"]], [one["max"] - one["ms"]]]
        times.barh(i, one["ms"], xerr=error, color="#0072B2", capsize=2)
        if one["peak_bytes"] is not None:
            memory.barh(i, one["peak_bytes"] / 2**20, color="#E69F00")
    times.set_yticks(range(len(names)), [label(name) for name in names], fontsize=8)
    times.invert_yaxis()
    _words(times, "a training step", "ms", "")
    _words(memory, "peak of what is held", "MiB", "")


def draw_roofline(figure: Any, roofline: Roofline) -> None:
    """Every kernel by its operations for each byte and its operations a second, under the measured ceilings."""
    figure.set_size_inches(8.5, 5.2)
    axes = figure.subplots()
    knee = roofline.throughput / roofline.bandwidth
    low = min(point.intensity for point in roofline.points) / 2
    high = max(knee, *(point.intensity for point in roofline.points)) * 2
    x = [low, knee, high]
    y = [min(one * roofline.bandwidth, roofline.throughput) / 1e12 for one in x]
    axes.plot(x, y, color="#000000", linewidth=1.2)
    text = f"a copy: {roofline.bandwidth / 1e12:.2f} TB/s; a GEMM: {roofline.throughput / 1e12:.0f} TFLOP/s"
    kernels = list(dict.fromkeys(point.kernel for point in roofline.points))
    shapes = list(dict.fromkeys(point.shape for point in roofline.points))
    for point in roofline.points:
        place = shapes.index(point.shape)
        axes.plot(
            point.intensity,
            point.throughput / 1e12,
            _MARKERS[kernels.index(point.kernel) % len(_MARKERS)],
            color=_COLORS[place % len(_COLORS)],
            markersize=6,
        )
    handles = [_key(axes, marker=_MARKERS[i % len(_MARKERS)], text=name) for i, name in enumerate(kernels)]
    handles += [_key(axes, color=_COLORS[i % len(_COLORS)], text=shape.title) for i, shape in enumerate(shapes)]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = f"{roofline.device}, {_SHORT[roofline.dtype]}; measured, {text}"
    _words(axes, title, "operations / byte that cannot be avoided", "TFLOP/s")


def _key(axes: Any, text: str, marker: str = "s", color: str = "#7f7f7f") -> Any:
    """A sign in the legend."""
    (line,) = axes.plot([], [], marker, color=color, label=text, markersize=6)
    return line


def _words(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
