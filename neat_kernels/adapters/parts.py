"""Which parts of a model a file is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.adapters.config import NeatConfig
from neat_kernels.adapters.description import SELECTION
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.fingerprint import check_plain
from neat_kernels.adapters.match import Target, check_adaptable, is_target
from neat_kernels.adapters.names import ADAPTED, NEAT, clean, is_wrapped, matches, named_modules
from neat_kernels.adapters.swap import Adapt, insert
from neat_kernels.adapters.weights import Weights
from neat_kernels.base_layer import adapter_dtype, as_matrix, is_conv1d
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.options import LayerOptions


@dataclass(frozen=True)
class Parts:
    """What of a model a file is about, by the names in the file.

    Args:
        layers: the options of each adapted layer.
        modules: modules that are trained whole.
        trained: names of other trained parameters.
    """

    layers: Mapping[str, LayerOptions]
    modules: Mapping[str, nn.Module]
    trained: tuple[str, ...] = ()


def find_parts(
    values: Mapping[str, Any],
    options: Callable[[str], LayerOptions],
    weights: Weights,
    ending: str,
    root: nn.Module,
) -> Parts:
    """The layers that the file has tensors for, held to what the configuration says.

    Args:
        values: of adapter_config.json, checked.
        options: of the layer of a name.
        weights: the file.
        ending: of the name of the tensor that every layer has.
        root: the model, without wrappers.

    Raises:
        AdapterError: the file, the configuration and the model do not fit.
    """
    path, modules = weights.path.parent, named_modules(root)
    names = [key.removesuffix(ending) for key in weights.shapes if key.endswith(ending)]
    if not names:
        raise AdapterError(f"{weights.path}: expected tensors that end in {ending!r}, got none")
    if unknown := [name for name in names if name not in modules]:
        raise AdapterError(f"{path}: expected layers that the model has, got {unknown[0]!r}, which it does not have")
    _check_names(names, values["peft_type"], modules, path)
    try:
        chosen = _selected(values, root, modules)
        layers = {name: options(name) for name in names}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None
    if missing := sorted(chosen - set(names)):
        raise AdapterError(f"{path}: the configuration names {missing[0]!r}, for which there are no tensors")
    if unnamed := sorted(set(names) - chosen):
        raise AdapterError(f"{path}: the configuration does not name {unnamed[0]!r}, for which there are tensors")
    if deep := [name for name, o in layers.items() if o.depth > len(weights.shapes)]:
        raise AdapterError(f"{path}: expected the tensors of depth {layers[deep[0]].depth}, got {len(weights.shapes)}")
    return Parts(layers, _saved(values, weights, modules), tuple(values.get("trained_parameters") or ()))


def _check_names(names: list[str], peft_type: str, modules: Mapping[str, nn.Module], path: Path) -> None:
    aliases: dict[int, list[str]] = {}
    for name, module in modules.items():
        aliases.setdefault(id(module), []).append(name)
    seen: dict[int, str] = {}
    for name in names:
        if (other := seen.setdefault(id(modules[name]), name)) != name:
            raise AdapterError(f"{path}: expected one adapter for the layer {name!r}, got another under {other!r}")
        if peft_type != NEAT and len(aliases[id(modules[name])]) > 1:
            raise AdapterError(
                f"{path}: expected layers with one name each, which PEFT adapts; "
                f"got {name!r}, which is also {', '.join(n for n in aliases[id(modules[name])] if n != name)!r}"
            )


def _saved(values: Mapping[str, Any], weights: Weights, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that are trained whole, each under the name that the file has."""
    entries = values.get("modules_to_save") or ()
    found: dict[int, str] = {}
    for name, module in modules.items():
        if matches(entries, name):
            in_file = any(key.startswith(f"{name}.") for key in weights.shapes)
            if in_file or id(module) not in found:
                found[id(module)] = name
    return {name: modules[name] for name in found.values()}


def _selected(values: Mapping[str, Any], root: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """The linear layers that the configuration means, each under the first of its names."""
    selection: dict[str, Any] = {name: values.get(name) for name in SELECTION}
    config = NeatConfig(**selection)
    seen: set[int] = set()
    chosen = set()
    for name, module in modules.items():
        linear = isinstance(module, (nn.Linear, *ADAPTED)) or is_conv1d(module)
        if linear and id(module) not in seen and is_target(name, root, modules, config):
            seen.add(id(module))
            chosen.add(name)
    return chosen


def sizes(name: str, modules: Mapping[str, nn.Module]) -> tuple[int, int, torch.dtype]:
    """N and K of a layer, and the dtype that its adapter has or will have.

    Raises:
        ValueError: the layer cannot be adapted.
        TypeError: it is no linear layer.
    """
    module = modules[name]
    if isinstance(module, FusedNeatLinear):
        return module.out_features, module.in_features, module.neat_A.dtype
    check_adaptable(name, module, modules.get(name.rpartition(".")[0], module))
    weight = module.get_parameter("weight")
    N, K = as_matrix(weight, is_conv1d(module)).shape
    return N, K, adapter_dtype(weight.dtype)


def described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def other_tensors(parts: Parts, root: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model that modules_to_save and trained_parameters name.

    Raises:
        AdapterError: a parameter is not the model's, or a frozen weight.
    """
    found = {
        f"{name}.{clean(key)}": check_plain(f"{name}.{key}", value)
        for name, module in parts.modules.items()
        for key, value in module.state_dict(keep_vars=True).items()
    }
    parameters = {clean(name): p for name, p in root.named_parameters(remove_duplicate=False)}
    frozen = {id(p) for name in parts.layers for p in (parameters.get(f"{name}.weight"),)}
    for name in parts.trained:
        if name not in parameters or id(parameters[name]) in frozen:
            raise AdapterError(f"trained_parameters: expected parameters of the model that may train, got {name!r}")
        found[name] = check_plain(name, parameters[name])
    return found


def insert_missing(root: nn.Module, parts: Parts, adapt: Adapt | None = None) -> None:
    """Put an adapter into every layer of the parts that has none, and let the rest of the parts train."""
    aliases: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    modules = named_modules(root)
    for name in parts.layers:
        if any(map(is_wrapped, aliases[id(modules[name])])):
            raise AdapterError(f"{name}: expected a layer that is not compiled by itself: load the adapter first")
    targets = [
        Target(modules[name], aliases[id(modules[name])], options)
        for name, options in parts.layers.items()
        if not isinstance(modules[name], ADAPTED)
    ]
    saved = {aliases[id(module)][0]: module for module in parts.modules.values()}
    insert(root, targets, saved, *(() if adapt is None else (adapt,)))
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if clean(name) in parts.trained:
            parameter.requires_grad_(True)
