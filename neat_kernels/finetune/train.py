"""Train one method on one task and measure it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from neat_kernels.finetune.batches import Batch, Rows, TaskTokens, plan_steps
from neat_kernels.finetune.checkpoint import read_state, restore_state, training_state, write_state
from neat_kernels.finetune.measure import ACCURACY, MEASURES, Measure, mean
from neat_kernels.finetune.memory import peak_of_step
from neat_kernels.finetune.methods import count, prepare, trainable_parameters
from neat_kernels.finetune.model import LanguageModel, Pretrained, TaskModel, TextClassifier
from neat_kernels.finetune.settings import Settings
from neat_kernels.interrupt import Interrupted

WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.06
MAX_GRADIENT_NORM = 1.0
EVALUATIONS = 5
UNTIMED_STEPS = 3


class TrainingError(RuntimeError):
    """Training went wrong in a way that more steps cannot mend."""


class Progress(Protocol):
    """What the training loop tells while it runs."""

    def start(self, method: str, steps: int) -> None:
        """A method begins."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A training step is done."""

    def evaluated(self, step: int, loss: float, value: float) -> None:
        """The validation split has been measured."""


@dataclass
class MethodResult:
    """What one method reached and what it cost.

    Args:
        method: its name.
        lr: peak learning rate of what trains in the model; the probe's is the head's.
        head_lr: peak learning rate of the head; None where there is none.
        trainable: parameters that train, head included.
        head: parameters of the head alone.
        losses: training loss of every step.
        validation: (step, value of the measure) pairs.
        test_values: for each test text the value of the measure for the final model, in the same order in every method;
            the mean of the seeds where there are several. For accuracy whether it gets the text right.
        step_ms: median time of a training step.
        tokens_per_second: tokens that are not padding, over all timed steps.
        peak_bytes: peak of the bytes held in tensors in the step with the most tokens; None where it is not known.
        seeds: the seeds that it was trained with.
        test_scores: value of the measure on the test split of each seed.
        grid: (learning rate, value in validation) of each rate that was tried; None for a loss that was not finite.
        diverged: whether the loss was no longer finite.
        measure: name of the measure.
        test_weights: weight of each test text in the mean; empty where all count alike.
    """

    method: str
    lr: float
    head_lr: float | None
    trainable: int
    head: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    test_values: list[float] = field(default_factory=list)
    step_ms: float = math.nan
    tokens_per_second: float = math.nan
    peak_bytes: int | None = None
    seeds: list[int] = field(default_factory=list)
    test_scores: list[float] = field(default_factory=list)
    grid: list[tuple[float, float | None]] = field(default_factory=list)
    diverged: bool = False
    measure: str = ACCURACY.name
    test_weights: list[float] = field(default_factory=list)

    @property
    def measured_by(self) -> Measure:
        """The measure."""
        return MEASURES[self.measure]

    @property
    def test_score(self) -> float:
        """Value of the measure on the test split for the final model."""
        return mean(self.test_values, self.test_weights)

    @property
    def merit(self) -> float:
        """A number that is larger for a better end in validation; the least if the training did not get there."""
        return -math.inf if self.diverged else self.measured_by.merit(self.validation[-1][1])


class Trainer:
    """The state of one method's training: model, optimizer, schedule and the precision it computes in."""

    def __init__(self, model: TaskModel, method: str, settings: Settings, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.evaluation_batch = model.evaluation_batch or settings.batch_size
        self.frozen_backbone = method == "probe"
        self.dtype = getattr(torch, settings.dtype)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, method, settings), weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_up_then_decay(step, settings.steps)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.last_loss = math.nan

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision if a half dtype was asked for."""
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if half else nullcontext()

    def train_mode(self) -> None:
        """Dropout on, except in a backbone of which nothing trains: a probe sees the features as they are."""
        self.model.train()
        if self.frozen_backbone:
            self.model.backbone.eval()

    def step(self, batch: Batch) -> None:
        """Forward, backward and optimizer on one batch; no gradients are left behind."""
        with self.autocast():
            loss = self.model.loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(trainable_parameters(self.model), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last_loss = loss.item()

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the state of the training, with facts about how far it is."""
        schedule = {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.get_last_lr()}
        own = {"schedule": schedule, "scaler": self.scaler.state_dict(), "last_loss": self.last_loss}
        write_state(path, training_state(self.model, self.optimizer, self.device), {**facts, "trainer": own})

    def restore(self, path: Path) -> dict[str, Any]:
        """Put the state back, and return the facts."""
        tensors, facts = read_state(path)
        restore_state(tensors, self.model, self.optimizer, self.device)
        own = facts["trainer"]
        self.schedule.last_epoch = own["schedule"]["last_epoch"]
        self.schedule._last_lr = own["schedule"]["last_lr"]
        for group, rate in zip(self.optimizer.param_groups, own["schedule"]["last_lr"], strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(own["scaler"])
        self.last_loss = own["last_loss"]
        return facts

    @torch.no_grad()
    def scores(self, tokens: Rows) -> tuple[list[float], list[float]]:
        """For each text, shortest first, the value of the measure, and its weight in the mean; none if all are 1."""
        self.model.eval()
        # Sum of the values and of the weights of each text, whose rows may be several.
        sums: dict[int, tuple[float, float]] = {}
        with self.autocast():
            for batch in tokens.in_order_of_length(self.evaluation_batch, self.device):
                scores = self.model.scores(batch)
                owners = batch.owners or range(len(sums), len(sums) + len(scores))
                for owner, (value, weight) in zip(owners, scores, strict=True):
                    before = sums.get(owner, (0.0, 0.0))
                    sums[owner] = before[0] + value, before[1] + weight
        weights = [weight for _, weight in sums.values()]
        return [value / weight for value, weight in sums.values()], [] if set(weights) == {1.0} else weights


def train_method(
    method: str,
    settings: Settings,
    pretrained: Pretrained,
    targets: Sequence[str],
    tokens: TaskTokens,
    num_labels: int | None,
    device: torch.device,
    progress: Progress,
    worth: Callable[[MethodResult, TaskModel], bool] = lambda result, model: True,
    state: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> MethodResult:
    """Load the model, train it by one method and measure it; every method sees the same head, batches and order.

    Args:
        method: probe, lora, neat or full.
        settings: the run's hyperparameters.
        pretrained: the model to load.
        targets: names of the linear layers that adapters go into.
        tokens: the task.
        num_labels: number of classes; None for a language model.
        device: where to train.
        progress: told about each step and evaluation.
        worth: given what was reached and the trained model before it is dropped; whether to read the test texts.
        state: file for the state, written at every evaluation and read if it is there.
        stopped: whether to write the state and stop.

    Returns:
        The measured result.

    Raises:
        TrainingError: if the loss is no longer finite.
        Interrupted: it was stopped.
    """
    torch.manual_seed(settings.seed)
    backbone = prepare(method, pretrained.load(getattr(torch, settings.dtype)), settings, targets)
    model: TaskModel
    if num_labels is None:
        model = LanguageModel(backbone).to(device)
    else:
        model = TextClassifier(backbone, pretrained.config.hidden_size, num_labels, settings.seed).to(device)
    torch.manual_seed(settings.seed)
    trainer = Trainer(model, method, settings, device)
    result = MethodResult(
        method,
        lr=settings.learning_rate(method),
        head_lr=settings.head_learning_rate(method),
        trainable=count(trainable_parameters(model)),
        head=count(head_parameters(model)),
        seeds=[settings.seed],
        measure=model.measure.name,
    )
    progress.start(method, settings.steps)
    run_steps(trainer, settings, tokens, result, progress, state, stopped)
    if worth(result, model):
        result.test_values, result.test_weights = trainer.scores(tokens.test)
    del trainer, model, backbone
    release_memory(device)
    return result


def run_steps(
    trainer: Trainer,
    settings: Settings,
    tokens: TaskTokens,
    result: MethodResult,
    progress: Progress,
    state: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """The training loop: every step timed, the one with the most tokens traced for memory instead."""
    plan = plan_steps(len(tokens.train), settings.batch_size, settings.steps, settings.seed)
    traced = largest_step(plan, tokens.train)
    every = max(1, math.ceil(settings.steps / EVALUATIONS))
    seconds: list[float] = []
    token_counts: list[int] = []
    first = _go_on(trainer, state, result, seconds, token_counts)
    trainer.train_mode()
    for index, rows in enumerate(plan[first:], start=first):
        batch = tokens.train.batch(rows, trainer.device)
        if index == traced:
            result.peak_bytes = peak_of_step(partial(trainer.step, batch), trainer.model, trainer.optimizer)
        else:
            seconds.append(timed(trainer, batch))
            token_counts.append(batch.tokens)
        require_finite(result, index + 1, trainer.last_loss)
        result.losses.append(trainer.last_loss)
        progress.step(index + 1, trainer.last_loss, sum(token_counts) / max(sum(seconds), 1e-9))
        due = False
        if (index + 1) % every == 0 or index + 1 == settings.steps:
            value = mean(*trainer.scores(tokens.validation))
            require_finite(result, index + 1, value)
            result.validation.append((index + 1, value))
            progress.evaluated(index + 1, statistics.fmean(result.losses[-every:]), value)
            trainer.train_mode()
            due = True
        if state is not None and (due or stopped()):
            facts = {"step": index + 1, "result": asdict(result), "seconds": seconds, "tokens": token_counts}
            trainer.save(state, facts)
        if stopped():
            raise Interrupted(f"{result.method}: stopped after step {index + 1} of {settings.steps}")
    if seconds:
        skip = min(UNTIMED_STEPS, len(seconds) - 1)
        result.step_ms = 1e3 * statistics.median(seconds[skip:])
        result.tokens_per_second = sum(token_counts[skip:]) / sum(seconds[skip:])


def _go_on(
    trainer: Trainer, state: Path | None, result: MethodResult, seconds: list[float], token_counts: list[int]
) -> int:
    """Put back the state of a training that was stopped, and return the steps that it has done."""
    if state is None or not state.is_file():
        return 0
    facts = trainer.restore(state)
    before = facts["result"]
    result.losses[:] = before["losses"]
    result.validation[:] = [tuple(pair) for pair in before["validation"]]
    result.peak_bytes = before["peak_bytes"]
    seconds[:], token_counts[:] = facts["seconds"], facts["tokens"]
    return int(facts["step"])


def parameter_groups(model: TaskModel, method: str, settings: Settings) -> list[dict[str, Any]]:
    """The head, if there is one, and what the method trains in the backbone, each with its own learning rate."""
    rates = settings.head_learning_rate(method), settings.learning_rate(method)
    parameters = head_parameters(model), trainable_parameters(model.backbone)
    return [{"params": list(group), "lr": rate} for group, rate in zip(parameters, rates, strict=True) if group]


def head_parameters(model: TaskModel) -> list[nn.Parameter]:
    """The parameters of the head, none if there is none."""
    return [] if model.head is None else list(model.head.parameters())


def timed(trainer: Trainer, batch: Batch) -> float:
    """Run one step and return its seconds; its loss is read back, which waits for the device."""
    start = time.perf_counter()
    trainer.step(batch)
    return time.perf_counter() - start


def largest_step(plan: Sequence[Sequence[int]], tokens: Rows) -> int:
    """The step with the largest padded batch, not the first one, in which the optimizer has no state yet."""
    sizes = [len(rows) * max(tokens.length(row) for row in rows) for rows in plan]
    later = range(1, len(plan)) if len(plan) > 1 else range(1)
    return max(later, key=sizes.__getitem__)


def require_finite(result: MethodResult, step: int, loss: float) -> None:
    """Raise TrainingError if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise TrainingError(f"{result.method}: the loss is {loss} at step {step}, lr {result.lr}; try a smaller --lr")


def warm_up_then_decay(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise over the first steps, then a linear fall to zero."""
    warm_up = max(1, round(WARMUP_SHARE * steps))
    return (step + 1) / warm_up if step < warm_up else max(0.0, (steps - step) / max(1, steps - warm_up))


def release_memory(device: torch.device) -> None:
    """Free what the last method left, so that the next one's peak is its own."""
    gc.collect()
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).empty_cache()
