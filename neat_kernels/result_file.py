"""JSON files of results: read whole, checked, and refused with what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Taken = TypeVar("Taken")


def read_result_file(path: Path, expected: str, take: Callable[[Any], Taken]) -> Taken:
    """What `take` makes of the content of a file.

    Args:
        path: of the file.
        expected: what it should be, in words.
        take: reads the parsed content, and fails as such reading fails where something is missing or wrong.

    Raises:
        ValueError: it is not there, is no JSON, or `take` failed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected {expected}, got {error}") from error
    try:
        return take(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path}: expected {expected}, got one without {error}") from error
