"""The trainings of one method: a learning rate from a grid, then every seed at that rate."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neat_kernels.files import write_atomically
from neat_kernels.finetune.model import TaskModel
from neat_kernels.finetune.settings import Settings
from neat_kernels.finetune.train import MethodResult, TrainingError
from neat_kernels.usage import UsageError

TRIALS = "trials"

# Trains by one method as the settings of one trial say, with a file for its state; the callable gets the trained model
# and what was reached so far, and says whether the test texts are worth reading.
Train = Callable[[str, Settings, Path, Callable[[MethodResult, TaskModel], bool]], MethodResult]


@dataclass(frozen=True)
class TrialFiles:
    """Where the trials of a run are written; a trial that has a result is not trained again.

    Args:
        folder: of the run.
        facts: what all trials of the run have in common, as JSON holds it.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def run(self) -> Path:
        """What the run was asked to do."""
        return self.folder / TRIALS / "run.json"

    def path(self, method: str, settings: Settings, suffix: str) -> Path:
        """The file of one trial."""
        rate = settings.learning_rate(method)
        return self.folder / TRIALS / f"{method}-lr{rate:g}-seed{settings.seed}{suffix}"

    def begin(self) -> None:
        """Say what the run was asked to do, before anything of it is written."""
        self.run.parent.mkdir(parents=True, exist_ok=True)
        if not self.run.exists():
            write_atomically(self.run, json.dumps(self.facts, indent=1).encode())

    def clear(self) -> None:
        """Drop the trials of an earlier run."""
        shutil.rmtree(self.folder / TRIALS, ignore_errors=True)

    def forget_if_empty(self) -> None:
        """Leave nothing behind of a run that came to nothing."""
        if not [path for path in self.run.parent.glob("*") if path != self.run]:
            self.clear()
            with suppress(OSError):
                self.folder.rmdir()

    def check_resumable(self) -> None:
        """Raise UsageError unless there is a whole run to go on with, that was asked to do the same."""
        if not self.run.is_file():
            raise UsageError(f"--resume: {self.folder} holds no run that was stopped")
        before = _read(self.run)
        now = json.loads(json.dumps(self.facts))
        if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            name = other[0]
            raise UsageError(
                f"--resume: expected what the run was begun with, {name} {before.get(name)!r}; got {now.get(name)!r}"
            )
        for path in sorted(self.run.parent.glob("*.json")):
            ended = None if path == self.run else _read_result(path)
            # What it has trained was written before its result was.
            if ended is not None and not ended.diverged and not (self.folder / ended.method).is_dir():
                raise UsageError(f"--resume: expected {self.folder / ended.method}, which the run has left; got none")

    def result(self, method: str, settings: Settings) -> MethodResult | None:
        """The result of a trial that has ended."""
        path = self.path(method, settings, ".json")
        return _read_result(path) if path.is_file() else None

    def ended(self, method: str, settings: Settings, result: MethodResult) -> None:
        """Write the result of a trial, and drop its state."""
        self.begin()
        write_atomically(self.path(method, settings, ".json"), json.dumps(asdict(result)).encode())
        self.path(method, settings, ".safetensors").unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds, or UsageError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--resume: expected {path} as the run has written it: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--resume: expected {path} as the run has written it, got a {type(values).__name__}")
    return values


def _read_result(path: Path) -> MethodResult:
    """The result of a trial that has ended, or UsageError."""
    values = _read(path)
    try:
        return MethodResult(**{**values, "validation": [tuple(pair) for pair in values["validation"]]})
    except (KeyError, TypeError) as error:
        raise UsageError(f"--resume: expected {path} as the run has written it: {error}") from error


def run_trials(
    method: str,
    settings: Settings,
    files: TrialFiles,
    train: Train,
    keep: Callable[[TaskModel], None],
) -> MethodResult:
    """Choose the learning rate by what validation measures where there is a grid, then train every seed with it.

    Args:
        method: probe, lora, neat or full.
        settings: of the run; its first seed is the one that the rate is chosen with.
        files: where trials are written.
        train: trains one of them.
        keep: given the trained model of the first seed at the best rate so far.

    Returns:
        The results of all seeds as one, with what each rate has reached.

    Raises:
        TrainingError: the loss is not finite, at every rate if there are several.
    """
    first = replace(settings, seed=settings.seeds[0])
    tried: list[MethodResult] = []
    for rate in settings.lrs or (settings.learning_rate(method),):
        trial = replace(first, lr=rate)
        tried.append(_one(method, trial, files, train, _keep_if_best(tried, keep), len(settings.lrs) > 1))
    best = max(tried, key=_rank)
    if best.diverged:
        raise TrainingError(f"{method}: the loss is not finite at any learning rate of {settings.lrs}")
    chosen = replace(settings, lr=best.lr)
    others = [
        _one(method, replace(chosen, seed=seed), files, train, lambda result, model: True, False)
        for seed in settings.seeds[1:]
    ]
    return combined([best, *others], tried if len(tried) > 1 else [])


def _one(
    method: str,
    trial: Settings,
    files: TrialFiles,
    train: Train,
    worth: Callable[[MethodResult, TaskModel], bool],
    may_diverge: bool,
) -> MethodResult:
    done = files.result(method, trial)
    if done is not None:
        return done
    try:
        result = train(method, trial, files.path(method, trial, ".safetensors"), worth)
    except TrainingError:
        if not may_diverge:
            raise
        rates = trial.learning_rate(method), trial.head_learning_rate(method)
        result = MethodResult(method, *rates, trainable=0, head=0, diverged=True)
    files.ended(method, trial, result)
    return result


def _keep_if_best(
    tried: Sequence[MethodResult], keep: Callable[[TaskModel], None]
) -> Callable[[MethodResult, TaskModel], bool]:
    def worth(result: MethodResult, model: TaskModel) -> bool:
        better = not tried or _rank(result) > max(map(_rank, tried))
        if better:
            keep(model)
        return better

    return worth


def _rank(result: MethodResult) -> tuple[float, float]:
    """Orders the rates: the better end in validation, of two alike the smaller rate."""
    return result.merit, -result.lr


def combined(runs: Sequence[MethodResult], tried: Sequence[MethodResult]) -> MethodResult:
    """The results of several seeds as one: curves and values are means, times are medians.

    Args:
        runs: one for each seed, at the same rate.
        tried: one for each rate of the grid.
    """
    first = runs[0]
    together = zip(*(run.test_values for run in runs), strict=True)
    curves = zip(*(run.validation for run in runs), strict=True)
    return dataclasses.replace(
        first,
        seeds=[seed for run in runs for seed in run.seeds],
        test_scores=[run.test_score for run in runs],
        grid=[(run.lr, None if run.diverged else run.validation[-1][1]) for run in tried],
        test_values=[statistics.fmean(values) for values in together],
        validation=[(points[0][0], statistics.fmean(value for _, value in points)) for points in curves],
        step_ms=statistics.median(run.step_ms for run in runs),
        tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
    )
