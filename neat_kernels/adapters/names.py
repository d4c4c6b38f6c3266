"""Names in adapter files, which are PEFT's, and the names that a module has in a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from neat_kernels.layer import FusedNeatLinear
from neat_kernels.lora_layer import FusedLoraLinear

ADAPTED = (FusedNeatLinear, FusedLoraLinear)

# PEFT wraps a model twice: PeftModel.base_model is the tuner, whose .model is the user's model.
PREFIX = "base_model.model."
PEANUT, NEAT, LORA = "PEANUT", "NEAT", "LORA"
PARAMETER_PREFIX = {PEANUT: "peanut_", NEAT: "neat_"}

# transformers.activations.ACT2FN: the first name of an activation is the one that is written.
_ACT_FN = {
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "silu": ("silu", "swish"),
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid",),
    "identity": ("linear",),
}
ACT_FN = {activation: names[0] for activation, names in _ACT_FN.items()}
ACTIVATION = {name: activation for activation, names in _ACT_FN.items() for name in names}

# Submodules that torch puts between a module and its child without changing what the model is.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def is_wrapped(name: str) -> bool:
    """Whether a name ends in what torch has put around a module."""
    return name.rpartition(".")[2] in _WRAPPERS


def clean(name: str) -> str:
    """A module's or parameter's name without the wrappers of torch."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its clean name, under every name that it has; a wrapper goes under the name of what it wraps."""
    return {clean(name): module for name, module in model.named_modules(remove_duplicate=False) if clean(name)}


def layer_parameters(layer: FusedNeatLinear) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the adapter with their names in a file, behind "neat_" or "peanut_"."""
    yield "A.weight", layer.neat_A
    yield "B.weight", layer.neat_B
    for kind, chain in (("encoders", layer.neat_encoders), ("decoders", layer.neat_decoders)):
        for index, parameter in enumerate(chain):
            yield f"{kind}.{index}.weight", parameter


def parameter_shapes(r: int, columns: int, depth: int) -> dict[str, tuple[int, int]]:
    """Names as in `layer_parameters` and shapes, from the options of a layer."""
    shapes = {"A.weight": (r, columns), "B.weight": (columns, r)}
    chain = [f"{kind}.{index}.weight" for kind in ("encoders", "decoders") for index in range(depth)]
    return {**shapes, **dict.fromkeys(chain, (r, r))}


def matches(entries: Iterable[str], name: str) -> bool:
    """Whether a name or its end after a dot is among the entries, as PEFT matches lists."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def by_pattern(patterns: Mapping[str, Any], name: str) -> tuple[str, Any] | None:
    """The first pattern that matches a whole name or its end after a dot, with its value, as PEFT matches patterns."""
    return next((item for item in patterns.items() if re.match(rf"(.*\.)?({item[0]})$", name)), None)


def naming(chosen: Collection[str], every: Iterable[str]) -> list[str] | str:
    """target_modules that mean exactly the chosen ones of all modules.

    Args:
        chosen: full names.
        every: full names of all modules.

    Returns:
        The last parts of the names where those suffice, else the full names, else a regex.
    """
    wanted, names = set(chosen), list(every)
    for entries in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if {name for name in names if matches(entries, name)} == wanted:
            return entries
    return "|".join(re.escape(name) for name in sorted(wanted))
