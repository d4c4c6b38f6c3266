"""What has changed between two result files beyond noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from neat_kernels.bench.contenders import BASELINE
from neat_kernels.bench.results import Case, Key, Results, key, per_process, ratios, sample_kinds


class Change(NamedTuple):
    """One contender of one case, then and now: ratios to the floor of each process, or the floor's own milliseconds."""

    case: Key
    contender: str
    graphs: bool
    before: list[float]
    after: list[float]

    @property
    def factor(self) -> float:
        """The median now as a multiple of the median then."""
        return statistics.median(self.after) / statistics.median(self.before)

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the medians are farther apart than both spreads together; None where a single process has none.

        A spread is the highest minus the lowest of the processes.
        """
        if min(len(self.before), len(self.after)) < 2:
            return None
        apart = abs(statistics.median(self.after) - statistics.median(self.before))
        return apart > _range(self.before) + _range(self.after)


class Comparison(NamedTuple):
    """Two result files beside each other.

    Fields:
        changes: of every contender that both have timed.
        missing: what only one of them has, in words.
        notes: differences between the runs that may explain a change.
    """

    changes: list[Change]
    missing: list[str]
    notes: list[str]


def compare(before: Results, after: Results) -> Comparison:
    """Put two results of one device beside each other.

    Raises:
        ValueError: they are of different devices, or have no case in common.
    """
    devices = before.provenance["device"], after.provenance["device"]
    if devices[0] != devices[1]:
        raise ValueError(f"expected results of one device, got {devices[0]!r} and {devices[1]!r}")
    then, now = ({key(case): case for case in results.cases} for results in (before, after))
    common = [one for one in then if one in now]
    if not common:
        raise ValueError(
            "expected results with a case in common, got none: no mode, shape, dtype and threads are equal"
        )
    changes = [change for one in common for change in _changes(one, then[one], now[one])]
    missing = [f"{_words(one)}: only in the old results" for one in then if one not in now]
    missing += [f"{_words(one)}: only in the new results" for one in now if one not in then]
    for one in common:
        names = [set(case["summary"]["ms"]) for case in (then[one], now[one])]
        missing += [f"{_words(one)}, {name}: only in the old results" for name in sorted(names[0] - names[1])]
        missing += [f"{_words(one)}, {name}: only in the new results" for name in sorted(names[1] - names[0])]
    return Comparison(changes, missing, _notes(before, after))


def _changes(one: Key, before: Case, after: Case) -> Iterator[Change]:
    for kind in sample_kinds([before]):
        for name in before["summary"]["ms"]:
            values = per_process if name == BASELINE else ratios
            pair = [values(case, name, kind) for case in (before, after)]
            if all(pair):
                yield Change(one, name, kind != "samples_ms", *pair)


def _notes(before: Results, after: Results) -> list[str]:
    facts = [
        {**results.provenance["versions"], "commit": results.provenance.get("commit")} for results in (before, after)
    ]
    names = [name for name in facts[0] if name in facts[1] and facts[0][name] != facts[1][name]]
    return [f"{name}: {facts[0][name]} then, {facts[1][name]} now" for name in names]


def _words(one: Key) -> str:
    block = f"block of {one.block} " if one.block else ""
    return f"{one.mode} {block}{one.shape} {one.dtype} on {one.device}, {one.threads} threads"


def _range(values: list[float]) -> float:
    return max(values) - min(values)
