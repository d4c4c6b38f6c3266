"""A covering array: few rows in which every pair of values of any two parameters meets."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def rows(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows {parameter: value} that together hold every pair of values; the same ones on every machine."""
    names = list(parameters)
    choose = random.Random(0)
    pending = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(parameters[names[a]]))
        for j in range(len(parameters[names[b]]))
    }
    found = []
    while pending:
        row = dict(min(pending))
        free = [n for n in range(len(names)) if n not in row]
        choose.shuffle(free)
        for n in free:
            values = list(range(len(parameters[names[n]])))
            choose.shuffle(values)
            row[n] = max(values, key=lambda v: sum(_pair((n, v), other) in pending for other in row.items()))
        pending -= {_pair(*two) for two in itertools.combinations(row.items(), 2)}
        found.append({names[n]: parameters[names[n]][v] for n, v in sorted(row.items())})
    return found


def name(row: Mapping[str, Any]) -> str:
    """A row as the id of a test."""
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in row.values())


def _pair(first: tuple[int, int], second: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (first, second) if first < second else (second, first)
