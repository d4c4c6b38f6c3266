"""PEFT's own layers of a model onto the fused path, and back: the class of each instance is switched, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.peanut.layer import Linear as PeanutLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from neat_kernels.cache import FeatureCache
from neat_kernels.integrations.peft.branches import Settings, route
from neat_kernels.integrations.peft.fused import FusedLayer, FusedNetworks, after_load
from neat_kernels.integrations.peft.lora import FusedLoraLinear
from neat_kernels.integrations.peft.merging import quantization_of
from neat_kernels.integrations.peft.peanut import FusedPeanutLinear
from neat_kernels.plan import choose_backend
from neat_kernels.vocabulary import BACKENDS, check_choice, check_compute_dtype

_FUSED: dict[type[nn.Module], type[FusedLayer]] = {PeanutLinear: FusedPeanutLinear, LoraLinear: FusedLoraLinear}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}
_OWN = ("_neat_settings", "_neat_cache", "_neat_original", "_neat_quantization")


@dataclass(frozen=True)
class Report:
    """What `accelerate` has done to the adapter layers of a model.

    Args:
        changed: names of the layers whose class was switched.
        unchanged: the other adapter layers, each with the reason.
        undo: whether the layers were switched back.
    """

    changed: tuple[str, ...]
    unchanged: dict[str, str]
    undo: bool = False

    def __str__(self) -> str:
        total = len(self.changed) + len(self.unchanged)
        lines = [f"{len(self.changed)} of {total} adapter layers {'are stock again' if self.undo else 'are fused'}"]
        for reason, count in Counter(self.unchanged.values()).most_common():
            example = next(name for name, why in self.unchanged.items() if why == reason)
            lines.append(f"  {count} left as {'it is' if count == 1 else 'they are'}: {reason} (such as {example})")
        if not self.undo:
            lines.append("  a layer that PEFT makes later is stock until the next call")
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, undo: bool = False, compute_dtype: torch.dtype | None = None, backend: str = "auto"
) -> Report:
    """Run PEFT's PEANuT and LoRA layers of a model on the fused path, with the same parameters, files and results.

    y = x·Wᵀ + bias + Σ_a s_a·(x̃·D_a)·U_aᵀ with D, U of the features of W (PEANuT) or lora_Aᵀ, lora_B (LoRA)

    Each layer's instance gets a subclass of its class, so that no class and no global of PEFT's changes; calling it
    again takes in the layers that were made since.

    Args:
        model: a PeftModel, or any model that holds layers of PEFT; changed in place.
        undo: give the layers PEFT's classes back.
        compute_dtype: dtype of the adapter branch over half inputs; None is the input's, torch.float32 is PEFT's own.
        backend: "auto", or "torch" / "triton", which runs or raises.

    Returns:
        Which layers are fused, and why the others are not.

    Raises:
        TypeError: the model is no module.
        ValueError: an option is not as above, or the model has no adapter layer that could be fused.
        BackendUnavailableError: `backend` cannot run where a layer is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model with layers of PEFT, got {type(model).__name__}")
    check_compute_dtype(compute_dtype)
    if compute_dtype not in (None, torch.float32):
        raise ValueError(f"compute_dtype must be None or torch.float32, got {compute_dtype}")
    check_choice("backend", backend, BACKENDS)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    if undo:
        return _undo(layers)
    settings, quantization = Settings(compute_dtype, backend), quantization_of(model)
    reasons = {name: _reason(layer) for name, layer in layers.items()}
    fit = {name: layer for name, layer in layers.items() if reasons[name] is None}
    unchanged = {name: reason for name, reason in reasons.items() if reason is not None}
    if not fit and not any(isinstance(layer, FusedLayer) for layer in layers.values()):
        found = str(Report((), unchanged)) if layers else f"no layer of PEFT in {type(model).__name__}"
        raise ValueError(f"expected PEANuT or LoRA layers of PEFT that can be fused, got {found}")
    for layer in fit.values():
        _check_backend(layer, backend)
    for layer in fit.values():
        _switch(layer, settings, quantization)
    return Report(tuple(fit), unchanged)


def _reason(layer: Any) -> str | None:
    """Why a layer cannot be fused, or None; asked of the class that it would get."""
    kind = type(layer)
    fused = kind if kind in _STOCK else _FUSED.get(kind)
    if fused is None and isinstance(layer, FusedLayer):
        return "it is fused already, with the options of its own configuration"
    if fused is None:
        name = f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__}"
        return f"{name} is neither PEFT's PEANuT nor its LoRA layer of a linear layer"
    reasons = [fused._obstacle(layer, name) for name in fused._known_names(layer)]
    if reasons and all(reasons):
        return reasons[0]
    way = route(layer, Settings())
    return way if isinstance(way, str) else None


def _check_backend(layer: Any, backend: str) -> None:
    weight = next(layer.parameters())
    if weight.device.type != "meta":
        choose_backend(backend, weight.device, (torch.float32,), 1)


def _switch(layer: Any, settings: Settings, quantization: Mapping[str, Any]) -> None:
    first = type(layer) in _FUSED
    layer._neat_settings = settings
    if first:
        layer.__class__ = _FUSED[type(layer)]
    if isinstance(layer, FusedNetworks):
        layer._neat_quantization = quantization
        if first:
            layer._neat_cache = FeatureCache()
            layer.register_load_state_dict_post_hook(after_load)
        layer.invalidate()


def _undo(layers: dict[str, Any]) -> Report:
    fused = {name: layer for name, layer in layers.items() if type(layer) in _STOCK}
    for name, layer in fused.items():
        if getattr(layer, "_neat_original", None) is not None:
            raise ValueError(f"{name} is merged into a quantised weight: call unmerge_adapter() before undoing")
    for layer in fused.values():
        hooks = layer._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is after_load]:
            del hooks[key]
        layer.__class__ = _STOCK[type(layer)]
        for attribute in _OWN:
            vars(layer).pop(attribute, None)
    unchanged = {name: "it is no layer that accelerate() has changed" for name in layers if name not in fused}
    return Report(tuple(fused), unchanged, undo=True)
