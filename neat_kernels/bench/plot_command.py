"""`neat-kernels plot`: what it is asked, and the files that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from neat_kernels.bench.plot import pictures, write_picture
from neat_kernels.usage import UsageError

FORMATS = ("svg", "png")


def run(files: Sequence[Path], output_dir: Path | None, format: str | None, overwrite: bool, console: Console) -> None:
    """Draw everything that the files give.

    Raises:
        UsageError: a file is no result, an option is malformed, or a picture is there already.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; got {format!r}")
    folder = Path() if output_dir is None else output_dir
    if not folder.is_dir():
        raise UsageError(f"--output-dir must be a folder that is there, got {folder}")
    try:
        found = pictures(files)
    except ValueError as error:
        raise UsageError(str(error)) from error
    targets = {what: folder / f"{files[-1].stem}-{what}.{format or 'svg'}" for what in found}
    there = [path for path in targets.values() if path.exists()]
    if there and not overwrite:
        raise UsageError(f"{there[0]} is there already: choose another --output-dir, or add --overwrite")
    for what, draw in found.items():
        write_picture(targets[what], draw, files)
        console.print(f"Written: {escape(str(targets[what]))}", highlight=False, soft_wrap=True)
