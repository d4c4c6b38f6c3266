"""A run of the tuner: one item after another, each written as soon as it is measured."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from tqdm import tqdm  # type: ignore[import-untyped]

from neat_kernels.kernels import launch, measured
from neat_kernels.kernels.configs import Config
from neat_kernels.tuning import TuningError, plans, problems
from neat_kernels.tuning.candidates import candidates
from neat_kernels.tuning.command import Item, Request, items
from neat_kernels.tuning.files import Folder, source
from neat_kernels.tuning.report import print_pending, print_summary
from neat_kernels.tuning.search import Outcome, search
from neat_kernels.tuning.timing import Prepare, prepare


class Measured(NamedTuple):
    """What a run came to."""

    outcomes: list[Outcome]
    limits: dict[str, tuple[int, dict[int, plans.Times]]]
    failed: dict[Item, str]
    left: list[Item]


class Session:
    """One run on one device.

    Args:
        request: what to measure.
        device: where.
        command: that asked for it, to be written beside the results.
        console: where to print.
        prepare: gets a problem ready to be timed.
        clock: seconds that pass.

    Raises:
        UsageError: the folder cannot be written to, or holds something else.
    """

    def __init__(
        self,
        request: Request,
        device: torch.device,
        command: str,
        console: Console,
        prepare: Prepare = prepare,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._device, self._console = request, device, console
        self._prepare, self._clock = prepare, clock
        self._target = launch.target(device)
        self._folder = Folder(request.folder)
        self._source = source(command)

    def run(self) -> Measured:
        """Measure what is pending, print what came of it.

        Raises:
            TuningError: an item could not be measured; all others are.
        """
        with self._folder_in_force():
            wanted = items(self._request, self._target)
            pending = self._pending(wanted)
            print_pending(self._target, pending, len(wanted), self._request, self._console)
            came = self._measure(pending)
        print_summary(came, self._folder, self._console)
        if came.failed:
            listed = "; ".join(f"{item}: {reason}" for item, reason in came.failed.items())
            raise TuningError(f"{len(came.failed)} of {len(pending)} could not be measured: {listed}")
        return came

    @contextlib.contextmanager
    def _folder_in_force(self) -> Iterator[None]:
        """Launches take what the folder says, wherever it is; afterwards they read their own file again."""
        entries = self._folder.config_entries()
        launch.use_measured({measured.key_of(entry): Config(**entry["config"]) for entry in entries})
        try:
            yield
        finally:
            launch.forget_measured()

    def _pending(self, wanted: list[Item]) -> list[Item]:
        """What this version of the code has not measured. Plans rest on configurations: newer ones, new plans."""
        if self._request.again:
            return wanted
        origins = {measured.key_of(entry): entry["source"] for entry in self._folder.config_entries()}
        new = [item for item in wanted if not item.is_plan and not self._is_done(origins.get(self._key(item)))]
        newest = max((origin["date"] for key, origin in origins.items() if key.device == self._target.name), default="")
        done = {
            entry["dtype"]
            for entry in self._folder.plan_entries()
            if entry["device"] == self._target.name and self._source.covers(entry["source"], newest)
        }
        return new + [item for item in wanted if item.is_plan and (new or item.table not in done)]

    def _is_done(self, origin: dict[str, object] | None) -> bool:
        return origin is not None and self._source.is_that_of(origin)

    def _key(self, item: Item) -> measured.Key:
        return measured.Key(self._target.arch, self._target.name, item.table, item.block_r)

    def _measure(self, pending: list[Item]) -> Measured:
        came = Measured([], {}, {}, [])
        end = self._clock() + 60 * self._request.minutes
        with tqdm(total=sum(item.configs for item in pending), unit="config", disable=not sys.stderr.isatty()) as bar:
            for item in pending:
                if self._clock() > end:
                    came.left.append(item)
                    continue
                bar.set_description(str(item))
                try:
                    self._measure_plan(item, came) if item.is_plan else self._measure_table(item, came)
                except Exception as error:
                    came.failed[item] = f"{type(error).__name__}: {error}"
                bar.update(item.configs)
        return came

    def _measure_table(self, item: Item, came: Measured) -> None:
        key = self._key(item)
        present = launch.config(item.table, self._device, item.block_r, problems.HALF.itemsize)
        problem = problems.build(item.table, item.block_r, problems.NOMINAL, self._device)
        outcome = search(key, present, candidates(item.table, present), problem, self._prepare, self._request.rounds)
        self._folder.add_config(key, outcome.chosen, self._source)
        launch.use_measured({key: outcome.chosen})
        came.outcomes.append(outcome)

    def _measure_plan(self, item: Item, came: Measured) -> None:
        lengths = plans.QUICK_LENGTHS if self._request.quick else plans.LENGTHS
        dtype = getattr(torch, item.table)
        times = plans.measure(lengths, dtype, self._device, self._prepare, self._request.rounds)
        limit = plans.limit(times)
        self._folder.add_plan(self._target.name, item.table, limit, self._source)
        came.limits[item.table] = (limit, times)
