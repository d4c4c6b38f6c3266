"""Read an adapter from a folder into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from neat_kernels.adapters.base_check import warn_of_other_base
from neat_kernels.adapters.description import Config, checked_config, read_config
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.inventory import take_inventory
from neat_kernels.adapters.names import (
    PARAMETER_PREFIX,
    layer_parameters,
    named_modules,
    parameter_shapes,
    unwrapped,
)
from neat_kernels.adapters.parallel import check_not_copied, check_whole
from neat_kernels.adapters.parts import Parts, described, find_parts, insert_missing, other_tensors, sizes
from neat_kernels.adapters.save import METADATA
from neat_kernels.adapters.weights import Weights
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.lora_layer import FusedLoraLinear
from neat_kernels.options import LayerOptions

Model = TypeVar("Model", bound=nn.Module)


def load_adapter(model: Model, folder: str | os.PathLike[str], *, check_base: bool = True) -> Model:
    """Read an adapter that `save_adapter`, or stock PEFT with PEANUT, has written.

    A plain model gets the Neat layers of the saved configuration first, as by `apply_neat`; a model that has them must
    have the same ones. Nothing is unpickled.

    Args:
        model: the base model, or one with the same Neat layers; changed in place.
        folder: with adapter_config.json and adapter_model.safetensors.
        check_base: hash each base weight and warn where it is not the one that the adapter was trained on.

    Returns:
        The same model; what the folder holds is trainable.

    Raises:
        AdapterError: a file is missing, broken or foreign, or does not fit the model. The model is unchanged then.
        ValueError: a layer of the model cannot be adapted. The model is unchanged then.
        TypeError: a layer of the model is no linear layer. The model is unchanged then.
    """
    check_whole(model, AdapterError)
    path = Path(folder)
    config = checked_config(path, read_config(path))
    root = unwrapped(model)
    modules = named_modules(root)
    with Weights(path) as weights:
        prefix = PARAMETER_PREFIX[config.peft_type]
        parts = find_parts(config.values, config.options, weights, f".{prefix}A.weight", root)
        _check_against_model(config, parts, root, modules, path)
        others = other_tensors(parts, root)
        values = weights.read_all({**_adapter_tensors(parts, modules, prefix), **described(others)})
        known = weights.own_metadata(METADATA)
    if any(not isinstance(modules[name], FusedNeatLinear) for name in parts.layers):
        check_not_copied(model, AdapterError)
    if check_base:
        warn_of_other_base(known, parts, modules, path)
    insert_missing(root, parts)
    _copy(root, parts, others, values, prefix)
    return model


def _check_against_model(
    config: Config, parts: Parts, root: nn.Module, modules: Mapping[str, nn.Module], path: Path
) -> None:
    if strangers := [name for name in config.values.get("layer_options") or {} if name not in parts.layers]:
        raise AdapterError(f"{path}: layer_options names {strangers[0]!r}, which has no tensors")
    if lora := [name for name, m in modules.items() if isinstance(m, FusedLoraLinear)]:
        raise AdapterError(f"expected a plain model, or one with Neat layers; {lora[0]!r} has a LoRA layer")
    there = {name: m for name, m in modules.items() if isinstance(m, FusedNeatLinear)}
    adapted = [name for name in parts.layers if name in there]
    if there and len(adapted) < len(parts.layers):
        missing = next(name for name in parts.layers if name not in there)
        raise AdapterError(f"expected a plain model, or Neat layers where the adapter has them; {missing!r} has none")
    if there:
        _check_nothing_else_is_trained(parts, root)
    ids = {id(modules[name]) for name in parts.layers}
    if surplus := [name for name, layer in there.items() if id(layer) not in ids]:
        raise AdapterError(f"expected Neat layers only where the adapter has them, got one at {surplus[0]!r} too")
    for name in adapted:
        layer = there[name]
        have, want = LayerOptions.of(layer, backend="auto"), parts.layers[name]
        if have != want:
            raise AdapterError(f"{name}: expected the options of the adapter, {want}; the layer has {have}")
        if layer.merged:
            raise AdapterError(f"{name} is merged: call unmerge() before load_adapter()")


def _check_nothing_else_is_trained(parts: Parts, root: nn.Module) -> None:
    """What another adapter has trained would stay beside this one."""
    inventory = take_inventory(root)
    theirs = {id(module) for module in parts.modules.values()}
    if kept := [name for name, module in inventory.modules.items() if id(module) not in theirs]:
        raise AdapterError(
            f"expected modules_to_save that the adapter has too, got {kept[0]!r}, which it does not have"
        )
    if kept := [name for name in inventory.trained if name not in parts.trained]:
        raise AdapterError(f"expected trained parameters that the adapter has too, got {kept[0]!r}")


def _adapter_tensors(
    parts: Parts, modules: Mapping[str, nn.Module], prefix: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each parameter that the adapters have or will have."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, options in parts.layers.items():
        N, K, dtype = sizes(name, modules)
        own = parameter_shapes(options.r, N if options.orientation == "out" else K, options.depth)
        tensors.update({f"{name}.{prefix}{suffix}": (shape, dtype) for suffix, shape in own.items()})
    return tensors


@torch.no_grad()
def _copy(
    root: nn.Module, parts: Parts, others: Mapping[str, Tensor], values: Mapping[str, Tensor], prefix: str
) -> None:
    modules = named_modules(root)
    for name in parts.layers:
        layer = modules[name]
        assert isinstance(layer, FusedNeatLinear)
        for suffix, parameter in layer_parameters(layer):
            parameter.copy_(values[f"{name}.{prefix}{suffix}"])
            parameter.requires_grad_(True)
    for name, tensor in others.items():
        tensor.copy_(values[name])
