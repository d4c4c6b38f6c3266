"""Fill the tables and pictures of the documentation from committed results.

    python -m benchmarks.document            write them
    python -m benchmarks.document --check    1 if a page does not say what the results say

A page marks a block by a comment before it and one after it, and what stands between is made:

    <!-- made: layer FILE [ms] [graphs] [memory] [mode=…] [dtype=…] [shapes=…,…] [contenders=…,…] -->
    <!-- made: model FILE -->
    <!-- made: origin FILE -->                      device, versions, commit, date and command of a result
    <!-- made: suite FOLDER -->                     everything that benchmarks.cpu_suite left in a folder
    <!-- made: picture NAME WHAT FILE [FILE…] -->   NAME beside the page; WHAT as neat-kernels plot calls it
    <!-- made end -->

Only measurements go in: a file of predictions is none of these kinds and is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu_suite import PARTS
from benchmarks.document_tables import layer_table, model_table, origin
from neat_kernels.bench.plot import digest, pictures, write_picture
from neat_kernels.bench.provenance import ROOT
from neat_kernels.files import write_atomically

PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"<!-- made: (?P<asked>[^\n]*?) -->\n(?P<content>.*?)<!-- made end -->", re.DOTALL)
_FLAGS = ("ms", "graphs", "memory")
_OPTIONS = ("mode", "dtype", "shapes", "contenders")


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; with --check 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if something would change")
    check = parser.parse_args(arguments).check
    differing = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        made, drawn = fill(text, page)
        if made != text:
            differing.append(name)
            if not check:
                write_atomically(page, made.encode())
        for path, draw in drawn.items():
            differing.append(str(path.relative_to(ROOT)))
            if not check:
                draw(path)
    for name in differing:
        print(f"{name} {'differs from the results: run python -m benchmarks.document' if check else 'written'}")
    return 1 if check and differing else 0


def fill(text: str, page: Path) -> tuple[str, dict[Path, Callable[[Path], None]]]:
    """A page with its blocks made anew.

    Args:
        text: of the page.
        page: its path, beside which pictures stand.

    Returns:
        The text, and for each picture that is missing or was made from other results what draws it.

    Raises:
        ValueError: a block asks for what there is not, or does not end.
    """
    drawn: dict[Path, Callable[[Path], None]] = {}

    def made(match: re.Match[str]) -> str:
        try:
            content = _make(shlex.split(match["asked"]), page, drawn)
        except (ValueError, OSError) as error:
            raise ValueError(f"{page.name}: {match['asked']}: {error}") from error
        return f"<!-- made: {match['asked']} -->\n{content}\n<!-- made end -->"

    begun, ended = text.count("<!-- made: "), text.count("<!-- made end -->")
    found = len(BLOCK.findall(text))
    if not begun == ended == found:
        raise ValueError(f"{page.name}: expected every block to begin and end, got {begun} beginnings and {ended} ends")
    return BLOCK.sub(made, text), drawn


def _make(words: list[str], page: Path, drawn: dict[Path, Callable[[Path], None]]) -> str:
    kind, *rest = words or [""]
    if kind == "layer" and rest:
        flags, options = _split(rest[1:])
        return layer_table(ROOT / rest[0], flags, options)
    if kind == "model" and len(rest) == 1:
        return model_table(ROOT / rest[0])
    if kind == "origin" and len(rest) == 1:
        return _origin(ROOT / rest[0])
    if kind == "suite" and len(rest) == 1:
        return _suite(ROOT / rest[0])
    if kind == "picture" and len(rest) > 2:
        name, what, *files = rest
        return _picture(page.parent / name, what, [ROOT / file for file in files], drawn)
    raise ValueError("expected layer, model, origin, suite or picture with a file, as python -m benchmarks.document -h")


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    flags = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = [word for word in flags if word not in _FLAGS] + [name for name in options if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"expected {', '.join(_FLAGS)} or values of {', '.join(_OPTIONS)}; got {unknown[0]!r}")
    return flags, options


def _origin(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    return origin(content["provenance"], content.get("processes", 1))


def _suite(folder: Path) -> str:
    """Every part that there is, in the suite's order: where it comes from, and its tables."""
    parts = [(part, folder / f"{part}.json") for part in PARTS if (folder / f"{part}.json").is_file()]
    if not parts:
        raise ValueError(f"expected results of benchmarks.cpu_suite in {folder}, got none")
    sections = []
    for part, path in parts:
        table = model_table(path) if part.startswith("model") else layer_table(path, [], {})
        sections.append(f"### {part}\n\n{_origin(path)}\n\n{table}")
        if part == "block":
            sections.append(layer_table(path, ["memory"], {}))
    return "\n\n".join(sections)


def _picture(path: Path, what: str, files: list[Path], drawn: dict[Path, Callable[[Path], None]]) -> str:
    found = pictures(files)
    if what not in found:
        raise ValueError(f"expected one of the pictures {', '.join(found)}; got {what!r}")
    if path.suffix != ".svg":
        raise ValueError(f"expected an .svg, which tells what it was made from; got {path.name}")
    if not path.is_file() or digest(files) not in path.read_text(encoding="utf-8"):
        drawn[path] = lambda target: write_picture(target, found[what], files)
    return f"![{what}]({path.name})"


if __name__ == "__main__":
    sys.exit(main())
