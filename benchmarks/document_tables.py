"""Measured results as Markdown: one function for each kind of block in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neat_kernels.bench.contenders import BASELINE, CONTENDERS
from neat_kernels.bench.measure import LABELS
from neat_kernels.bench.model_results import label, read_model_results
from neat_kernels.bench.results import Case, read_results
from neat_kernels.bench.shapes import LayerShape

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# So many cases fit beside the names into a page.
_COLUMNS = 4


def layer_table(path: Path, flags: Sequence[str], options: dict[str, str]) -> str:
    """Ratios to the floor.

    Args:
        path: a result file of `neat-kernels bench` or benchmarks.layer_ratio.
        flags: "ms" for milliseconds beside every ratio, "graphs" for the times under CUDA graphs, "memory" for the
            peak of a call and the bytes saved for backward.
        options: mode, dtype, shapes (several, with commas between) and contenders (the same) that are shown; all
            without.

    Returns:
        One table for every four cases, those of a mode together.

    Raises:
        ValueError: no case is left, or it has no such times.
    """
    cases = read_results(path).cases
    for name in ("mode", "dtype"):
        if name in options:
            cases = [case for case in cases if case[name] == options[name]]
    if "shapes" in options:
        cases = [case for shape in options["shapes"].split(",") for case in cases if case["shape"] == shape]
    if not cases:
        raise ValueError(f"{path}: expected a case with {options}, got none")
    if "graphs" in flags and not all("graphs" in case["summary"] for case in cases):
        raise ValueError(f"{path}: expected times under CUDA graphs, got a case without")
    names = options["contenders"].split(",") if "contenders" in options else None
    tables = []
    for mode in dict.fromkeys(case["mode"] for case in cases):
        listed = [case for case in cases if case["mode"] == mode]
        columns = 1 if "memory" in flags else _COLUMNS
        for first in range(0, len(listed), columns):
            tables.append(_layer_table(listed[first : first + columns], flags, names))
    return "\n\n".join(tables)


def _layer_table(cases: Sequence[Case], flags: Sequence[str], names: list[str] | None) -> str:
    kind = "graphs" if "graphs" in flags else "eager"
    shown = [name for name in (names or CONTENDERS) if any(name in _times(case, kind)["ms"] for case in cases)]
    caption = LABELS[cases[0]["mode"]] + (", CUDA graphs" if kind == "graphs" else "")
    header = [caption, "adapter"]
    for case in cases:
        header += [_head(case), *(["peak, MiB", "saved, MiB"] if "memory" in flags else [])]
    rows = []
    for name in shown:
        row = [CONTENDERS[name].label, _adapter(cases, name)]
        for case in cases:
            row.append(_cell(case, name, kind, "ms" in flags))
            if "memory" in flags:
                row += [_mib(case, kind, name) for kind in ("peak_bytes", "saved_bytes")]
        rows.append(row)
    return markdown(header, rows)


def _times(case: Case, kind: str) -> dict[str, Any]:
    times: dict[str, Any] = case["summary"]["graphs"] if kind == "graphs" else case["summary"]
    return times


def _head(case: Case) -> str:
    shape = LayerShape.parse(case["shape"])
    what = f"block of {case['block']}, M={shape.tokens}, r={shape.r}" if case.get("block") else shape.title
    return f"{what}, {SHORT[case['dtype']]}"


def _adapter(cases: Sequence[Case], name: str) -> str:
    kept = {run["contenders"].get(name, {}).get("adapter_dtype") for case in cases for run in case["runs"]}
    return ", ".join(sorted(SHORT[dtype] for dtype in kept if dtype))


def _cell(case: Case, name: str, kind: str, with_ms: bool) -> str:
    times = _times(case, kind)
    if name not in times["ms"]:
        return "–"
    ms = _milliseconds(times["ms"][name])
    one = times["ratios"][f"{name}/{BASELINE}"]
    ratio = f"{one['median']:.2f}"
    if len(case["runs"]) > 1 and name != BASELINE:
        ratio += f" ({one['min']:.2f}–{one['max']:.2f})"
    return f"{ratio} = {ms}" if with_ms or name == BASELINE else ratio


def _milliseconds(value: float) -> str:
    """Three digits, thousands whole."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def _mib(case: Case, kind: str, name: str) -> str:
    count = case["summary"].get(kind, {}).get(name)
    return "–" if count is None else f"{count / 2**20:,.1f}"


def model_table(path: Path) -> str:
    """Step times, tokens a second and peak memory of whole models, of a result file of benchmarks.model_step."""
    content = read_model_results(path)
    several = content["processes"] > 1
    what = f"{content['model']}, {content['targets']}, r={content['r']}, {content['tokens']} tokens"
    header = [f"{what}, {SHORT[content['dtype']]}", "trained", "ms a step", "/ frozen", "tokens/s", "peak, MiB"]
    rows = []
    for name, one in content["summary"].items():
        spread = f" ({one['min']:,.0f}–{one['max']:,.0f})" if several else ""
        peak = "–" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:,.0f}"
        ratio = "–" if one["ratio"] is None else f"{one['ratio']:.2f}"
        time = f"{one['ms']:,.0f}{spread}"
        rows.append([label(name), f"{one['trained']:,}", time, ratio, f"{one['tokens_per_second']:,.0f}", peak])
    return markdown(header, rows)


def origin(facts: dict[str, Any], processes: int) -> str:
    """A sentence that says where a result comes from, and the command that printed it."""
    shown = ("python", "torch", "triton", "peft", "transformers")
    named = [f"{name} {facts['versions'][name]}" for name in shown if facts["versions"].get(name)]
    driver = f", driver {facts['driver']}" if facts["driver"] else f" ({facts['cpu_capability']})"
    spread = f"median and range of {processes} fresh processes" if processes > 1 else "one process, hence no spread"
    commit, plus, _ = facts["commit"].partition("+")
    when = f"commit {commit[:7]}{' with changes' if plus else ''}, {facts['date'][:10]}"
    where = f"{facts['device']}{driver}; {', '.join(named)}; {when}; {spread}."
    return f"Measured on {where}\n\n```bash\n{facts['command']}\n```"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
