"""Which parts of a model a file is about."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.fingerprint import check_plain
from neat_kernels.adapters.inventory import ADAPTED
from neat_kernels.adapters.match import Target
from neat_kernels.adapters.names import clean, matches, named_modules
from neat_kernels.adapters.swap import Adapt, insert
from neat_kernels.adapters.weights import Weights
from neat_kernels.base_layer import is_conv1d
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
    modules: Mapping[str, nn.Module],
) -> Parts:
    """The layers that the file has tensors for, held to what the configuration says.

    Args:
        values: of adapter_config.json, checked.
        options: of the layer of a name.
        weights: the file.
        ending: of the name of the tensor that every layer has.
        modules: of the model, by name.

    Raises:
        AdapterError: the file, the configuration and the model do not fit.
    """
    path = weights.path.parent
    names = [key.removesuffix(ending) for key in weights.shapes if key.endswith(ending)]
    if not names:
        raise AdapterError(f"{weights.path}: expected tensors that end in {ending!r}, got none")
    if unknown := [name for name in names if name not in modules]:
        raise AdapterError(f"{path}: expected layers that the model has, got {unknown[0]!r}, which it does not have")
    saved = {name: module for name, module in modules.items() if matches(values.get("modules_to_save") or (), name)}
    if missing := sorted(_selected(values, modules, saved) - set(names)):
        raise AdapterError(f"{path}: the configuration names {missing[0]!r}, for which there are no tensors")
    try:
        layers = {name: options(name) for name in names}
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None
    return Parts(layers, saved, tuple(values.get("trained_parameters") or ()))


def _selected(values: Mapping[str, Any], modules: Mapping[str, nn.Module], saved: Collection[str]) -> set[str]:
    """The linear layers that target_modules means; nothing where the configuration narrows its choice further."""
    targets = values.get("target_modules")
    if not targets or any(values.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return set()
    within = tuple(f"{name}." for name in saved)
    seen: set[int] = set()
    chosen = set()
    for name, module in modules.items():
        linear = isinstance(module, (nn.Linear, *ADAPTED)) or is_conv1d(module)
        wanted = re.fullmatch(targets, name) if isinstance(targets, str) else matches(targets, name)
        if linear and wanted and id(module) not in seen and name not in saved and not name.startswith(within):
            seen.add(id(module))
            chosen.add(name)
    return chosen


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
    frozen = {f"{name}.weight" for name in parts.layers}
    for name in parts.trained:
        if name not in parameters or name in frozen:
            raise AdapterError(f"trained_parameters: expected parameters of the model that may train, got {name!r}")
        found[name] = check_plain(name, parameters[name])
    return found


def insert_missing(root: nn.Module, parts: Parts, adapt: Adapt | None = None) -> None:
    """Put an adapter into every layer of the parts that has none, and let the rest of the parts train."""
    aliases: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    modules = named_modules(root)
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
