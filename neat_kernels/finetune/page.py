"""The report of a run as one HTML file that needs no other: table, curves, and what was run on what."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from neat_kernels.files import write_atomically
from neat_kernels.finetune.report import comparisons, perplexities, rates_tried, results_table
from neat_kernels.finetune.train import MethodResult

REPORT = "report.html"
_WIDTH = 110
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font-family: sans-serif; }}
pre {{ overflow-x: auto; font-family: monospace; }}
img {{ width: 100%; }}
</style>
<h1>{title}</h1>
{results}
<img alt="Training loss, validation {measure} and test {measure} of each method" src="data:image/png;base64,{picture}">
<h2>What was trained, and how to load it</h2>
{left}
<h2>What was run</h2>
{facts}
</html>
"""


def write_page(
    path: Path,
    title: str,
    picture: bytes,
    facts: Mapping[str, Any],
    results: Sequence[MethodResult],
    left: Sequence[str],
) -> None:
    """Write the report.

    Args:
        path: the file to write.
        title: what was trained on what.
        picture: the curves, a PNG.
        facts: what the run was, by name.
        results: the measured methods.
        left: how to load what was trained, a line each.
    """
    told = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        told.add_row(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    page = _PAGE.format(
        title=html.escape(title),
        measure=results[0].measure,
        results=_as_html(results_table(results), *perplexities(results), *rates_tried(results), *comparisons(results)),
        picture=base64.b64encode(picture).decode(),
        left=_as_html(*left),
        facts=_as_html(told),
    )
    write_atomically(path, page.encode())


def _as_html(*printed: Table | str) -> str:
    """What a terminal would show, in its colours."""
    console = Console(record=True, file=io.StringIO(), width=_WIDTH)
    for one in printed:
        console.print(one, highlight=False, markup=False, soft_wrap=isinstance(one, str))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
