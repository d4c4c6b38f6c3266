"""A whole run: look up the model, read the data, train each method, write the results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from neat_kernels.environment import device_name, versions
from neat_kernels.finetune.artifacts import Task, how_to_load, save_language_model, save_trained
from neat_kernels.finetune.batches import plan_steps
from neat_kernels.finetune.data import TextData
from neat_kernels.finetune.measure import ACCURACY, LOSS
from neat_kernels.finetune.methods import ALL_LINEAR
from neat_kernels.finetune.model import Pretrained, TaskModel, TextClassifier, require_targets
from neat_kernels.finetune.page import REPORT, write_page
from neat_kernels.finetune.progress import TerminalProgress
from neat_kernels.finetune.report import (
    CURVES,
    RESULTS,
    comparisons,
    draw_curves,
    perplexities,
    rates_tried,
    results_json,
    results_table,
)
from neat_kernels.finetune.settings import LM, METHODS, Settings
from neat_kernels.finetune.tasks import Reading, default_length, read
from neat_kernels.finetune.train import MethodResult, TrainingError, train_method
from neat_kernels.finetune.trials import TRIALS, TrialFiles, run_trials
from neat_kernels.interrupt import Interrupted, first_interrupt_waits
from neat_kernels.usage import UsageError

ADAPTER_METHODS = frozenset({"lora", "neat"})


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, looked up and checked before the first step."""

    device: torch.device
    pretrained: Pretrained
    targets: tuple[str, ...]
    reading: Reading


def run(settings: Settings, console: Console) -> Path:
    """Train and compare the chosen methods.

    Args:
        settings: the run.
        console: where to tell about it.

    Returns:
        The folder that now holds the results.

    Raises:
        UsageError: if something that was asked for cannot be done; nothing has been trained or written then.
        TrainingError: if a method's loss is no longer finite; what earlier methods have trained is there then.
    """
    prepared = prepare_run(settings, console)
    files = TrialFiles(settings.output, run_facts(settings, prepared))
    begin_or_go_on(settings, files)
    print_plan(settings, prepared, console)
    results = train_all(settings, prepared, files, console)
    left = [line for method in settings.methods for line in how_to_load(settings.output / method)]
    console.print(results_table(results))
    for line in (*perplexities(results), *rates_tried(results), *comparisons(results)):
        console.print(line, highlight=False)
    write_results(settings, prepared, results, left)
    console.print("What was trained, and how to load it:", *left, sep="\n  ", soft_wrap=True, markup=False)
    files_left = ", ".join(str(settings.output / name) for name in (REPORT, CURVES, RESULTS))
    console.print(f"Report, curves and numbers: {files_left}", soft_wrap=True)
    return settings.output


def train_all(settings: Settings, prepared: Prepared, files: TrialFiles, console: Console) -> list[MethodResult]:
    """Every method's result."""
    results: list[MethodResult] = []
    measure = LOSS if settings.task == LM else ACCURACY
    with TerminalProgress(console, measure) as progress, first_interrupt_waits() as stopped:

        def train(method: str, trial: Settings, state: Path, worth: Any) -> MethodResult:
            files.begin()
            return train_method(
                method,
                trial,
                prepared.pretrained,
                prepared.targets,
                prepared.reading.tokens,
                prepared.reading.num_labels,
                prepared.device,
                progress,
                worth,
                state,
                stopped,
            )

        try:
            for method in settings.methods:
                results.append(run_trials(method, settings, files, train, partial(leave, method, settings, prepared)))
        except Interrupted as error:
            done = ", ".join(result.method for result in results) or "no method yet"
            raise Interrupted(f"{error}; done: {done}. The same command with --resume goes on from there.") from error
        except TrainingError:
            files.forget_if_empty()
            raise
    return results


def run_facts(settings: Settings, prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    silent = ("output", "overwrite", "resume", "device")
    asked = {name: value for name, value in settings.as_dict().items() if name not in silent}
    reading = prepared.reading
    return {**asked, "device": prepared.device.type, "texts": reading.data.hashed(), **reading.decided}


def begin_or_go_on(settings: Settings, files: TrialFiles) -> None:
    """Check that there is a run to go on with, or clear away the trials of one that is replaced."""
    if settings.resume:
        files.check_resumable()
    elif settings.overwrite:
        files.clear()


def leave(method: str, settings: Settings, prepared: Prepared, model: TaskModel) -> None:
    """Write what a method has trained."""
    # A folder by its whole path, since the model may be loaded from another one.
    local = settings.model is not None and prepared.pretrained.local
    name = os.path.abspath(prepared.pretrained.location) if local else settings.model
    tokens, data = prepared.reading.tokens, prepared.reading.data
    batch = tokens.validation.batch(range(min(len(tokens.validation), settings.batch_size)), prepared.device)
    # The folder was free when the run began, or may be replaced; now it may hold a learning rate that was less good.
    folder = settings.output / method
    if isinstance(model, TextClassifier):
        assert isinstance(data, TextData)
        task = Task(name, data.label_names, tokens.max_length, settings.pair_column is not None)
        save_trained(folder, method, model, task, batch, overwrite=True)
    else:
        assert name is not None, "refused by the settings"
        save_language_model(folder, method, model, name, prepared.pretrained.tokenizer, batch, overwrite=True)


def prepare_run(settings: Settings, console: Console) -> Prepared:
    """Look up and check device, output folder, model, targets and data, cheapest first."""
    if (processes := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UsageError(f"expected to be started as one process, got WORLD_SIZE={processes}, as torchrun sets it")
    device = choose_device(settings.device)
    check_output(settings.output, settings.overwrite or settings.resume)
    pretrained = Pretrained.find(settings.model, settings.task)
    max_length = choose_max_length(settings, pretrained)
    targets = choose_targets(settings, pretrained)
    with console.status("Reading the data") as status:
        reading = read(settings, pretrained, targets, max_length, device, status.update)
    plan_steps(len(reading.tokens.train), settings.batch_size, 1, settings.seed, reading.row)
    return Prepared(device, pretrained, targets, reading)


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the first accelerator there is, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device must be auto or a device that is there, such as cpu; {name!r}: {reason}") from error
    if device.type == "meta":
        raise UsageError("--device must be a device that computes; got 'meta'")
    return device


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UsageError unless results can be written to `output` without replacing others unasked."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output must be a folder; {output} is a file")
    there = [name for name in (CURVES, REPORT, RESULTS, *METHODS, TRIALS) if (output / name).exists()]
    if there and not overwrite:
        raise UsageError(f"--output {output} holds {there[0]} of an earlier run: choose another, or add --overwrite")
    parent = output.absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UsageError(f"--output {output}: {parent} cannot be written to")


def choose_max_length(settings: Settings, pretrained: Pretrained) -> int:
    """How many tokens of each text are read."""
    longest = pretrained.max_length()
    if settings.max_length is None:
        return min(longest, default_length(settings))
    if settings.max_length > longest:
        raise UsageError(f"--max-length must be at most {longest} for this model, got {settings.max_length}")
    return settings.max_length


def choose_targets(settings: Settings, pretrained: Pretrained) -> tuple[str, ...]:
    """The layers that adapters go into: those named, or the default; none if no method puts in any."""
    if not ADAPTER_METHODS & set(settings.methods):
        return ()
    targets = settings.target_modules or pretrained.default_targets()
    if targets != (ALL_LINEAR,):
        require_targets(pretrained.module_names, targets, pretrained.output_layer)
    return targets


def print_plan(settings: Settings, prepared: Prepared, console: Console) -> None:
    """Tell what is about to be trained on what."""
    data, reading = prepared.reading.data, prepared.reading
    sizes, labels = data.sizes(), f"; {reading.num_labels} labels" if reading.num_labels else ""
    splits = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{prepared.pretrained.name} on {device_name(prepared.device)}, {settings.dtype}")
    table.add_row("data", data.source)
    table.add_row("", f"{splits}{labels}")
    for line in reading.told:
        table.add_row("", line)
    if prepared.targets:
        table.add_row("adapters", f"{', '.join(prepared.targets)}; r={settings.r}")
    for note in data.notes:
        table.add_row("note", note)
    console.print(table, markup=False)


def write_results(settings: Settings, prepared: Prepared, results: list[MethodResult], left: list[str]) -> None:
    """Write curves and report, then the numbers: where results.json is, the run is whole."""
    settings.output.mkdir(parents=True, exist_ok=True)
    title, data = picture_title(settings, prepared), prepared.reading.data
    draw_curves(settings.output / CURVES, results, title)
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(prepared.device),
        "threads": torch.get_num_threads(),
        "model": prepared.pretrained.name,
        "target_modules": prepared.targets,
        "data": {"source": data.source, "sizes": data.sizes(), "notes": data.notes, **prepared.reading.facts},
        "settings": settings.as_dict(),
    }
    write_page(settings.output / REPORT, title, (settings.output / CURVES).read_bytes(), facts, results, left)
    results_json(settings.output / RESULTS, facts, results)


def picture_title(settings: Settings, prepared: Prepared) -> str:
    """What was trained on what, in one line."""
    data = "docstrings" if settings.data is None else settings.data.name
    rank = f", r={settings.r}" if prepared.targets else ""
    texts, num_labels = len(prepared.reading.data.train), prepared.reading.num_labels
    labels = f", {num_labels} labels" if num_labels else ""
    return f"{prepared.pretrained.name} on {data}: {texts:,} training texts{labels}{rank}"
