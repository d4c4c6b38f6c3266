"""Measured ratios as tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neat_kernels.bench.compare import Change, Comparison
from neat_kernels.bench.contenders import BASELINE, CONTENDERS
from neat_kernels.bench.measure import LABELS
from neat_kernels.bench.results import Case
from neat_kernels.bench.shapes import LayerShape

# So many cases fit beside the names into 80 columns.
_COLUMNS = 3
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def print_facts(facts: dict[str, Any], threads: int, console: Console) -> None:
    """Print what a run is of."""
    versions = ", ".join(f"{package} {version or '(not installed)'}" for package, version in facts["versions"].items())
    where = f"{facts['device']} (CPU {facts['cpu_capability']}), {threads} CPU threads, commit {facts['commit']}"
    console.print(escape(f"{where}\n{versions}"), highlight=False)


def print_results(cases: Sequence[Case], console: Console) -> None:
    """Print a table of ratios to the floor for every mode and dtype, and one of memory."""
    for mode, dtype in dict.fromkeys((case["mode"], case["dtype"]) for case in cases):
        listed = [case for case in cases if (case["mode"], case["dtype"]) == (mode, dtype)]
        for first in range(0, len(listed), _COLUMNS):
            part = listed[first : first + _COLUMNS]
            title = f"{LABELS[mode]}, {_SHORT[dtype]}, {part[0]['device']}"
            _print_ratios(f"{title}: as a ratio to the frozen linear", part, "samples_ms", console)
            if any("graphs" in case["summary"] for case in part):
                _print_ratios(f"{title}, under CUDA graphs", part, "graph_samples_ms", console)
            saved = "" if mode == "inference" else ", and saved for backward"
            _print_memory(f"{title}: MiB at the peak of a call{saved}", part, console)


def _print_ratios(title: str, cases: Sequence[Case], samples: str, console: Console) -> None:
    console.print(f"[bold]{title}[/]", highlight=False)
    table = _table(cases)
    for name in _names(cases):
        cells = [_ratio(case, name, samples) for case in cases]
        table.add_row(escape(CONTENDERS[name].label), *cells)
    runs = len(cases[0]["runs"])
    table.caption = "of one process" if runs == 1 else f"median and range of {runs} processes"
    console.print(table)
    for case in cases:
        for name in case["contenders"]:
            for entry in (run["contenders"][name] for run in case["runs"]):
                if entry["status"] in ("wrong", "failed"):
                    console.print(
                        f"[red]{escape(name)} {entry['status']}[/] at {case['shape']}: {escape(entry['reason'])}"
                    )
                    break


def _ratio(case: Case, name: str, samples: str) -> str:
    times = case["summary"] if samples == "samples_ms" else case["summary"].get("graphs", {"ms": {}})
    if name not in times["ms"]:
        entry = case["runs"][0]["contenders"].get(name, {"status": "not asked"})
        return "no graph" if "no_graph" in entry else str(entry["status"])
    if name == BASELINE:
        return f"1 = {times['ms'][name]:.3g} ms"
    ratio = times["ratios"][f"{name}/{BASELINE}"]
    spread = f" ({ratio['min']:.2f}–{ratio['max']:.2f})" if len(case["runs"]) > 1 else ""
    return f"{ratio['median']:.2f}{spread}"


def _print_memory(title: str, cases: Sequence[Case], console: Console) -> None:
    console.print(f"[bold]{title}[/]", highlight=False)
    table = _table(cases)
    for name in _names(cases):
        cells = []
        for case in cases:
            counts = [case["summary"].get(kind, {}).get(name) for kind in ("peak_bytes", "saved_bytes")]
            cells.append(", ".join(f"{count / 2**20:.1f}" for count in counts if count is not None) or "–")
        table.add_row(escape(CONTENDERS[name].label), *cells)
    console.print(table)


def _table(cases: Sequence[Case]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("")
    for case in cases:
        shape = LayerShape.parse(case["shape"])
        what = f"block of {case['block']}" if case.get("block") else f"{shape.in_features}→{shape.out_features}"
        table.add_column(f"M={shape.tokens}\n{what}, r={shape.r}", justify="right")
    return table


def _names(cases: Sequence[Case]) -> list[str]:
    """The contenders that any case was asked for, but for those that could not run in any."""
    names = dict.fromkeys(name for case in cases for name in case["contenders"])
    entries = {name: [run["contenders"].get(name) for case in cases for run in case["runs"]] for name in names}
    return [name for name in names if any(entry and entry["status"] != "skipped" for entry in entries[name])]


def print_skipped(cases: Sequence[Case], console: Console) -> None:
    """Print who took no part, and why."""
    entries = [entry for case in cases for run in case["runs"] for entry in run["contenders"].items()]
    reasons = {name: entry["reason"] for name, entry in entries if entry["status"] == "skipped"}
    for name, reason in reasons.items():
        console.print(f"{CONTENDERS[name].label} took no part: {escape(reason)}", highlight=False)


def print_comparison(compared: Comparison, console: Console) -> None:
    """Print what has changed beyond noise, what cannot be told, and what only one side has."""
    for note in (*compared.notes, *compared.missing):
        console.print(escape(note), highlight=False)
    changed = [change for change in compared.changes if change.beyond_noise]
    untold = [change for change in compared.changes if change.beyond_noise is None]
    if changed:
        table = Table(box=SIMPLE, title="Changed beyond noise", title_style="bold", title_justify="left")
        for column in ("layer", "contender", "then", "now", "change"):
            table.add_column(column, justify="left" if column in ("layer", "contender") else "right")
        for change in changed:
            one = change.case
            shape = LayerShape.parse(one.shape)
            what = f"block of {one.block}, M={shape.tokens}, r={shape.r}" if one.block else shape.title
            where = f"{one.mode}, {what}, {_SHORT[one.dtype]}" + (", graphs" if change.graphs else "")
            table.add_row(where, change.contender, *_then_and_now(change), f"{100 * (change.factor - 1):+.1f} %")
        console.print(table)
    told = len(compared.changes) - len(untold)
    if told:
        console.print(
            f"{len(changed)} of {told} figures have changed beyond noise: their medians are farther apart than both "
            "spreads together. The frozen linear is compared by its milliseconds, the others by their ratio to it.",
            highlight=False,
        )
    if untold:
        console.print(f"{len(untold)} figures are of one process, which has no spread: nothing can be told.")


def _then_and_now(change: Change) -> tuple[str, str]:
    unit = " ms" if change.contender == BASELINE else ""

    def told(values: list[float]) -> str:
        return f"{statistics.median(values):.3g}{unit} ({min(values):.3g}–{max(values):.3g})"

    return told(change.before), told(change.after)
