"""The ways to train a whole model, and the step of one of them measured in this process."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import ALL_LINEAR, MODELS, Model
from neat_kernels.finetune.memory import peak_of_step

WARM_UP = 2
# Of the loss, whose own size is about log(vocabulary); bf16 carries 8 bits through every layer.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def _frozen(model: Any, settings: Model, targets: list[str]) -> Any:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def _full(model: Any, settings: Model, targets: list[str]) -> Any:
    return model


def _neat(model: Any, settings: Model, targets: list[str]) -> Any:
    import neat_kernels as nk

    return nk.apply_neat(model, nk.NeatConfig(r=settings.r, target_modules=targets))


def _accelerated(model: Any, settings: Model, targets: list[str]) -> Any:
    from neat_kernels.integrations.peft import accelerate

    adapted = _peft_peanut(model, settings, targets)
    accelerate(adapted)
    return adapted


def _peft_lora(model: Any, settings: Model, targets: list[str], autocast_adapter_dtype: bool = True) -> Any:
    import peft

    config = peft.LoraConfig(r=settings.r, lora_alpha=settings.r, target_modules=targets, bias="none")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


def _peft_lora_half(model: Any, settings: Model, targets: list[str]) -> Any:
    return _peft_lora(model, settings, targets, autocast_adapter_dtype=False)


def _peft_lora_liger(model: Any, settings: Model, targets: list[str]) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError("expected liger_kernel to be installed")
    # Nothing but it runs in this process: what it replaces in transformers meets no other contender.
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return _peft_lora(model, settings, targets)


def _peft_peanut(model: Any, settings: Model, targets: list[str]) -> Any:
    import peft

    config = peft.PeanutConfig(r=settings.r, depth=0, act_fn="relu", scaling=1.0, target_modules=targets)
    return peft.get_peft_model(model, config)


CONTENDERS: dict[str, Callable[[Any, Model, list[str]], Any]] = {
    "frozen": _frozen,
    "neat": _neat,
    "accelerated": _accelerated,
    "peft_lora": _peft_lora,
    "peft_lora_half": _peft_lora_half,
    "peft_peanut": _peft_peanut,
    "full": _full,
}
if importlib.util.find_spec("liger_kernel") is not None:
    CONTENDERS["peft_lora_liger"] = _peft_lora_liger


@dataclass(frozen=True)
class Training:
    """A model ready to be trained by one contender, and the loss that it begins with."""

    model: Any
    optimizer: torch.optim.Optimizer
    ids: Tensor
    loss: float
    trained: int

    def step(self) -> None:
        """Forward, backward and AdamW."""
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def prepare(name: str, model_name: str, targets_name: str, dtype: str, device: torch.device) -> Training:
    """Build a model, adapt it by a contender, and hold its loss to the frozen model's.

    Raises:
        RuntimeError: the loss is another.
    """
    settings = MODELS[model_name]
    model = settings.build(getattr(torch, dtype), device)
    targets = list(ALL_LINEAR if targets_name == "all-linear" else settings.targets)
    shape = (settings.batch, settings.length)
    ids = torch.randint(settings.config["vocab_size"], shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    model = CONTENDERS[name](model, settings, targets).train()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    if not abs(loss - expected) <= TOLERANCE[dtype] * expected:
        raise RuntimeError(f"expected the frozen model's loss {expected:.6f}, B being zero, got {loss:.6f}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    return Training(model, optimizer, ids, loss, sum(p.numel() for p in trained))


def measure(name: str, options: Any) -> dict[str, Any]:
    """Build, check and time one contender in this process.

    Args:
        name: key of CONTENDERS.
        options: model, targets, dtype, device, threads and steps.

    Returns:
        Parameters trained, ms of every step, the peak of the bytes held, and the loss.
    """
    torch.set_num_threads(options.threads)
    training = prepare(name, options.model, options.targets, options.dtype, torch.device(options.device))
    for _ in range(WARM_UP):
        training.step()
    ms = [timed(training) for _ in range(options.steps)]
    peak = peak_of_step(training.step, training.model, training.optimizer)
    return {"trained": training.trained, "ms": ms, "peak_bytes": peak, "loss": training.loss}


def timed(training: Training) -> float:
    """Milliseconds of a step, the device's part of it waited for."""
    on_gpu = training.ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    training.step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
