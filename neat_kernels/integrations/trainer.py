"""The Trainer of transformers, and of what is built on it, such as TRL's SFTTrainer: what training an adapter shows."""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neat_kernels.integrations.parameter_groups import parameter_groups
from neat_kernels.integrations.updates import Update, measure_updates
from neat_kernels.vocabulary import check_int

__all__ = ["NeatCallback", "parameter_groups"]

PREFIX = "neat/"


class NeatCallback(TrainerCallback):
    """Adds to what the Trainer logs of training: the size of the updates, dead features, speed and memory.

    ‖ΔW‖_F² = Σ_layers tr((UᵀU)·(DᵀD))

    `NeatCallback().attach(trainer)`; every reporter of the Trainer and `state.log_history` then get

    - neat/delta_norm: ‖ΔW‖_F over all adapted layers; neat/delta_norm_relative: that over ‖W‖_F of the same layers.
    - neat/dead_relu_share: features behind a relu that are zero in every row, of all that are behind a relu.
    - neat/step_time_s: seconds of an optimizer step, in the mean since the last log, with the loading of data and
      without evaluation and saving.
    - neat/tokens_per_second: tokens of this process's batches in the same time: the ones of attention_mask [M,L], else
      the elements of input_ids; left out where a batch has neither.
    - neat/peak_memory_mib: torch's peak since the process began, on that GPU of the model where it is highest; for a
      model on the CPU the peak resident memory of the process, where the system tells it.

    Only the first process of a distributed run measures. Gradients and random numbers are not touched. A trained
    parameter that the first step gives no gradient is warned of: whoever reads a layer's weight and never calls the
    layer trains no adapter of it.

    Args:
        every: the Trainer is asked to log at multiples of this many steps, and ΔW is measured only then; None measures
            whenever the Trainer logs.
        per_layer: add neat/delta_norm/<layer> for each layer.

    Raises:
        TypeError: `every` is no int.
        ValueError: `every` is below 1.
    """

    def __init__(self, *, every: int | None = None, per_layer: bool = False) -> None:
        if every is not None:
            check_int("every", every, 1)
        if not isinstance(per_layer, bool):
            raise TypeError(f"per_layer must be True or False, got {per_layer!r}")
        self.every, self.per_layer = every, per_layer
        self._attached = self._warned = self._checked = False
        self._weight_norms: dict[str, float | None] = {}
        self._window = _Window()

    def attach(self, trainer: Trainer) -> NeatCallback:
        """Put the callback before the Trainer's reporters, and count the tokens of its training steps.

        `callbacks=` and `add_callback` would put it behind the reporters, which would then not get its figures.

        Args:
            trainer: a Trainer that has no NeatCallback yet.

        Returns:
            The callback itself.

        Raises:
            TypeError: `trainer` is no Trainer.
            ValueError: it has such a callback, or this one is attached elsewhere.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"expected a Trainer of transformers, got {type(trainer).__name__}")
        callbacks = trainer.callback_handler.callbacks
        if self._attached or any(isinstance(callback, NeatCallback) for callback in callbacks):
            raise ValueError("expected a callback and a Trainer that are not attached yet, got one that is")
        self._attached = True
        # Behind DefaultFlowCallback, which decides on the steps that are logged.
        flow = [i for i, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)
        trainer.training_step = self._counting(trainer.training_step)
        return self

    def _counting(self, training_step: Any) -> Any:
        @functools.wraps(training_step)
        def counted(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._window.count(inputs)
            return training_step(model, inputs, *args, **kwargs)

        return counted

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a place behind the reporters."""
        self._check_attached()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew."""
        self._check_attached()
        self._weight_norms, self._window = {}, _Window()
        self._warned = self._checked = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise ValueError(
                "expected NeatCallback(...).attach(trainer), got it by callbacks= or add_callback(), which put it "
                "behind the Trainer's reporters: they would not get its figures"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock at the first step."""
        if self._window.began is None:
            self._window = _Window(time.perf_counter(), state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Warn of parameters that the first step does not reach."""
        if self._checked or model is None:
            return
        self._checked = True
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        missed = [name for name, p in parameters if p.grad is None]
        # DeepSpeed keeps every gradient elsewhere.
        if 0 < len(missed) < len(parameters):
            warnings.warn(
                f"{len(missed)} of {len(parameters)} trained parameters got no gradient in the first step, such as "
                f"{missed[0]}: nothing calls their layer",
                stacklevel=2,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to log."""
        self._window.training_until = time.perf_counter()
        if self._measures(state):
            control.should_log = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time of evaluation out."""
        self._window.leave_out()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time of saving out."""
        self._window.leave_out()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a log of training."""
        # Evaluation and the end of training are logged too, without a loss of training.
        if logs is None or model is None or "loss" not in logs or not state.is_world_process_zero:
            return
        figures = {**self._window.figures(state.global_step), **_peak_memory(model)}
        if self.every is None or self._measures(state):
            figures.update(self._updates(model))
        figures = {PREFIX + name: value for name, value in figures.items()}
        logs.update(figures)
        # The Trainer has put a copy of the log there, before it calls the callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self._window = _Window(time.perf_counter(), state.global_step)

    def _measures(self, state: TrainerState) -> bool:
        return self.every is not None and state.global_step % self.every == 0

    def _updates(self, model: nn.Module) -> dict[str, float]:
        updates, left_out = measure_updates(model, self._weight_norms)
        if not self._warned and (left_out or not updates):
            example = next(iter(left_out.items()), ("the model", "it has no adapted layer"))
            warnings.warn(
                f"NeatCallback measures {len(updates)} of {len(updates) + len(left_out)} adapted layers: "
                f"{example[0]}: {example[1]}",
                stacklevel=2,
            )
            self._warned = True
        return _summary(updates, self.per_layer)


@dataclass
class _Window:
    """What there was since the last log."""

    began: float | None = None
    step: int = 0
    training_until: float = 0.0
    left_out: float = 0.0
    # On the device of the batches, so that counting waits for nothing; None: a batch could not be counted.
    tokens: Tensor | int | None = 0

    def count(self, inputs: Any) -> None:
        if self.tokens is not None:
            tokens = _tokens(inputs)
            self.tokens = None if tokens is None else self.tokens + tokens

    def leave_out(self) -> None:
        """Leave out the time since training last went on."""
        now = time.perf_counter()
        if self.began is not None:
            self.left_out += now - max(self.training_until, self.began)
            self.training_until = now

    def figures(self, step: int) -> dict[str, float]:
        if self.began is None or step <= self.step:
            return {}
        seconds = time.perf_counter() - self.began - self.left_out
        found = {"step_time_s": seconds / (step - self.step)}
        if self.tokens is not None:
            found["tokens_per_second"] = int(self.tokens) / seconds
        return found


def _tokens(inputs: Any) -> Tensor | int | None:
    if not isinstance(inputs, Mapping):
        return None
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.sum()
    tokens = inputs.get("input_ids")
    return tokens.numel() if isinstance(tokens, Tensor) else None


def _summary(updates: Mapping[str, Update], per_layer: bool) -> dict[str, float]:
    if not updates:
        return {}
    every = updates.values()
    found = {"delta_norm": _root(u.delta_norm for u in every)}
    both = [(u.delta_norm, u.weight_norm) for u in every if u.weight_norm]
    if both:
        found["delta_norm_relative"] = _root(d for d, _ in both) / _root(w for _, w in both)
    if features := sum(u.features for u in every):
        found["dead_relu_share"] = sum(u.dead for u in every) / features
    if per_layer:
        found.update({f"delta_norm/{name}": u.delta_norm for name, u in updates.items()})
    return found


def _root(norms: Any) -> float:
    return float(sum(norm**2 for norm in norms)) ** 0.5


def _peak_memory(model: nn.Module) -> dict[str, float]:
    devices = {p.device for p in model.parameters()}
    if gpus := [device for device in devices if device.type == "cuda"]:
        return {"peak_memory_mib": max(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20}
    if devices != {torch.device("cpu")}:
        return {}
    try:
        import resource
    except ImportError:
        return {}
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
