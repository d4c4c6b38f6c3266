"""Write a Neat adapter as the LoRA adapter that it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neat_kernels.adapters.description import FILES
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.folder import check_destination
from neat_kernels.adapters.inventory import Inventory, Layer, copied, take_inventory
from neat_kernels.adapters.names import LORA, PREFIX, naming
from neat_kernels.adapters.parallel import check_whole
from neat_kernels.adapters.save import write_adapter
from neat_kernels.base_layer import as_matrix
from neat_kernels.vocabulary import check_int

# The ranks that vLLM compiles its kernels for: vllm/config/lora.py, MaxLoRARanks.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportedLora:
    """What was written.

    Args:
        folder: where.
        r: the rank of every layer, zeros included.
        layers: number of layers.
        parameters: number of values in the file.
        max_difference: largest difference of a logit between the model and the exported adapter over the same base;
            None without a batch.
        max_logit: largest absolute logit of the model; None without a batch.
    """

    folder: Path
    r: int
    layers: int
    parameters: int
    max_difference: float | None = None
    max_logit: float | None = None

    def __str__(self) -> str:
        text = f"{self.folder}: LORA, rank {self.r}, {self.layers} layers, {self.parameters:,} parameters"
        if self.max_difference is None:
            return text
        return f"{text}; logits differ by at most {self.max_difference:.3g} of {self.max_logit:.3g}"


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    pad_to: int | str | None = None,
    batch: Mapping[str, Any] | Tensor | None = None,
    overwrite: bool = False,
) -> ExportedLora:
    """Write the adapter as LoRA, exactly: lora_A = Dᵀ, lora_B = s·U, so that lora_B·lora_A = ΔW.

    It holds for the base weights that it was computed from. Stock PEFT and what serves its LoRA folders load it.

    Args:
        model: a model with Neat layers (or those of `from_lora`) inside, merged or not.
        folder: a new or empty folder; its parents are made.
        pad_to: rank of every layer, with zeros beyond its own; None is the largest rank there is, "vllm" the next one
            that vLLM takes.
        batch: keyword arguments, or the one argument, of the model; it is run with both adapters, in eval mode.
        overwrite: replace an adapter that is there.

    Returns:
        What was written, and how far the logits differ over the batch.

    Raises:
        AdapterError: the model is sharded; there is no adapted layer; LoRA cannot hold what is trained (a bias, or a
            module that shares a parameter with another part of the model; for vLLM any module); a layer's rank is above
            `pad_to`; values are not finite; the folder exists. Nothing is written then.
        OSError: the disk is full or cannot be written. What was in the folder is still there then.
    """
    check_whole(model, AdapterError)
    destination = Path(folder)
    check_destination(destination, overwrite, FILES)
    inventory = take_inventory(model, lora=True)
    r = _rank(inventory, pad_to)
    _check_expressible(inventory, pad_to)
    factors = {name: _padded(name, layer, r) for name, layer in inventory.layers.items()}
    difference, largest = (None, None) if batch is None else _compare(model, inventory, factors, batch)
    tensors = {f"{PREFIX}{name}": copied(name, value) for name, value in inventory.other_tensors()}
    for name, (lora_A, lora_B) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_B
    write_adapter(destination, _config(inventory, r), tensors, inventory.fingerprints())
    parameters = sum(t.numel() for t in tensors.values())
    return ExportedLora(destination, r, len(factors), parameters, difference, largest)


def _rank(inventory: Inventory, pad_to: int | str | None) -> int:
    name, largest = max(((name, layer.r) for name, layer in inventory.layers.items()), key=lambda item: item[1])
    if pad_to is None:
        return largest
    if pad_to == "vllm":
        fitting = [r for r in VLLM_RANKS if r >= largest]
        if not fitting:
            raise AdapterError(f"pad_to='vllm': expected ranks up to {VLLM_RANKS[-1]}, got {largest} at {name!r}")
        return fitting[0]
    if isinstance(pad_to, str):
        raise AdapterError(f"pad_to: expected a rank, 'vllm' or None, got {pad_to!r}")
    check_int("pad_to", pad_to, 1)
    if pad_to < largest:
        raise AdapterError(f"pad_to: expected at least the rank of {name!r}, {largest}; got {pad_to}")
    return pad_to


def _check_expressible(inventory: Inventory, pad_to: int | str | None) -> None:
    if inventory.trained:
        names = ", ".join(list(inventory.trained)[:5])
        raise AdapterError(f"expected adapters and modules_to_save to be all that is trained, got {names} too")
    if inventory.modules and pad_to == "vllm":
        raise AdapterError(f"expected no modules_to_save, which vLLM does not load; got {', '.join(inventory.modules)}")
    # Conv1D and every option of a layer are no matter to LoRA.
    held = [reason for reason in inventory.description.unsupported if "Conv1D" not in reason]
    if held:
        raise AdapterError(f"expected a model that PEFT's LoRA can adapt, got {held[0]}")


def _padded(name: str, layer: Layer, r: int) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = (copied(f"{name}.{which}", t) for which, t in zip("AB", layer.lora_factors(), strict=True))
    extra = r - layer.r
    return F.pad(lora_A, (0, 0, 0, extra)), F.pad(lora_B, (0, extra))


def _config(inventory: Inventory, r: int) -> dict[str, Any]:
    about = inventory.description
    return {
        "peft_type": LORA,
        "auto_mapping": about.auto_mapping,
        "base_model_name_or_path": about.base,
        "revision": None,
        "task_type": about.task_type,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": all(layer.transposed for layer in inventory.layers.values()),
        "init_lora_weights": True,
        "target_modules": naming(inventory.layers, inventory.every),
        "modules_to_save": list(about.modules_to_save) or None,
    }


@torch.no_grad()
def _compare(
    model: nn.Module,
    inventory: Inventory,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    batch: Mapping[str, Any] | Tensor,
) -> tuple[float, float]:
    """The largest difference of a logit to LoRA's own arithmetic, and the largest logit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ours = _logits(model, batch)
        with _as_lora(inventory.layers, factors):
            theirs = _logits(model, batch)
    finally:
        for module, training in modes:
            module.training = training
    wide = ours.double()
    return (wide - theirs.double()).abs().max().item(), wide.abs().max().item()


def _logits(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> Tensor:
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, Tensor):
        return output
    raise AdapterError(f"batch: expected a model that returns a tensor or has logits, got {type(output).__name__}")


@contextmanager
def _as_lora(layers: Mapping[str, Layer], factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let each layer compute as PEFT's LoRA layer does, with the factors that are in the file."""
    try:
        for name, layer in layers.items():
            weight = as_matrix(layer.base_weight, layer.transposed)
            lora_A, lora_B = (factor.to(weight.device) for factor in factors[name])
            layer.__dict__["forward"] = _lora_forward(weight, layer.bias, lora_A, lora_B)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _lora_forward(weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return (y + F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B)).to(y.dtype)

    return forward
