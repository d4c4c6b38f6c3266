"""The gate's report: JSON with everything, Markdown with a table per target."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = ["kernel", "case", "warps", "stages", "registers", "spills", "shared", "blocks/SM", "matrix", "accesses"]


def distinct_kernels(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace every kernel in the launches of `cases` by its index in the list that is returned, equal ones by one.

    Args:
        cases: what case.run returned; changed in place.

    Returns:
        The kernels in order of appearance.
    """
    numbers: dict[str, int] = {}
    for case in cases:
        for launch in case["launches"]:
            launch["kernel"] = numbers.setdefault(json.dumps(launch["kernel"]), len(numbers))
    return [json.loads(kernel) for kernel in numbers]


def write_markdown(path: Path, content: dict[str, Any]) -> None:
    """Write the tables of a report to `path`, under a temporary name first.

    Args:
        path: the file.
        content: what is in the report's JSON file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("\n".join(_markdown(content)) + "\n")
    partial.replace(path)


def _markdown(content: dict[str, Any]) -> Iterator[str]:
    facts = content["provenance"]
    yield "# Compile gate"
    yield ""
    ptxas = ", ".join(f"{version} ({', '.join(names)})" for version, names in _grouped(content["ptxas"]).items())
    yield f"Triton {facts['versions']['triton']}, ptxas {ptxas or 'not used'}. Compiled, not run, by"
    yield f"`{facts['command']}`."
    yield ""
    yield "matrix: matrix instructions. spills: bytes a thread. shared: bytes a block. accesses: bytes a thread of the"
    yield "narrowest load ← and store → of global memory through each argument; tma moves a tile at a time."
    for target in content["targets"]:
        yield from _table(target, content)
    if content["violations"]:
        yield ""
        yield "## Violations"
        yield ""
        yield from (f"- {violation}" for violation in content["violations"])


def _table(target: str, content: dict[str, Any]) -> Iterator[str]:
    """One row a kernel, under the first case that launches it."""
    yield ""
    yield f"## {target}"
    yield ""
    yield "| " + " | ".join(_HEAD) + " |"
    yield "|---" * len(_HEAD) + "|"
    first: dict[int, str] = {}
    for case in content["cases"]:
        for launch in case["launches"]:
            first.setdefault(launch["kernel"], case["case"])
    for number, kernel in enumerate(content["kernels"]):
        if kernel["target"] == target:
            name, *rest = _row(kernel)
            yield "| " + " | ".join([name, first[number], *rest]) + " |"


def _row(kernel: dict[str, Any]) -> list[str]:
    spills = kernel["spill_stores"] + kernel["spill_loads"] or kernel["spilled_registers"] or kernel["local_bytes"]
    return [
        kernel["kernel"],
        str(kernel["num_warps"]),
        str(kernel["num_stages"]),
        str(kernel["registers"]),
        str(spills),
        str(kernel["shared"]),
        str(kernel["blocks_per_multiprocessor"]),
        ", ".join(f"{number} × {name}" for name, number in kernel["mma"].items()) or "–",
        " ".join(f"{name or '?'}{_narrowest(kinds)}" for name, kinds in kernel["accesses"].items()),
    ]


def _narrowest(kinds: dict[str, dict[str, int]]) -> str:
    arrows = {"load": "←", "store": "→"}
    return "".join(arrows[kind] + min(widths, key=_width) for kind, widths in kinds.items())


def _width(bytes_or_tma: str) -> float:
    return float("inf") if bytes_or_tma == "tma" else int(bytes_or_tma)


def _grouped(versions: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for target, version in versions.items():
        grouped.setdefault(version, []).append(target)
    return grouped
