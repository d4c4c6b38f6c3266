"""From a configuration to the layers it means, refusing what would be silently wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from neat_kernels.adapters.config import NeatConfig
from neat_kernels.adapters.names import by_pattern, matches
from neat_kernels.base_layer import checked_weight, is_conv1d
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.options import LayerOptions
from neat_kernels.vocabulary import nearest

# Names under which transformers keeps the head of a classifier.
CLASSIFIER_HEADS = ("score", "classifier")


@dataclass
class Target:
    """A layer to adapt, under every name that it has in the model, and the options of its adapter."""

    module: nn.Module
    names: list[str]
    options: LayerOptions


def find_targets(model: nn.Module, config: NeatConfig) -> list[Target]:
    """The layers of `model` that `config` means, each checked to be adaptable.

    Raises:
        ValueError: nothing matches, an entry of the configuration matches nothing, or a matched layer cannot be
            adapted.
        TypeError: a matched module is no linear layer.
    """
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    inside = {
        f"{name}.{child}"
        for name, m in modules.items()
        if isinstance(m, FusedNeatLinear)
        for child, _ in m.named_modules()
        if child
    }
    names = [name for name in modules if name not in inside]
    matched = [name for name in names if is_target(name, model, modules, config)]
    _check_entries_used(names, matched, modules, config)
    targets: dict[int, Target] = {}
    used_patterns: set[str] = set()
    for name in matched:
        module = modules[name]
        if id(module) in targets:
            continue
        aliases = [alias for alias in names if modules[alias] is module]
        if any(_excluded(alias, config) for alias in aliases):
            continue
        for alias in aliases:
            check_adaptable(alias, module, modules.get(alias.rpartition(".")[0], model))
        targets[id(module)] = Target(module, aliases, config.layer_options(_rank(name, config, used_patterns)))
    if unused := set(config.rank_pattern) - used_patterns:
        raise ValueError(f"rank_pattern {sorted(unused)} matched none of the adapted layers, for example {matched[:5]}")
    return list(targets.values())


def find_modules_to_save(model: nn.Module, config: NeatConfig) -> dict[str, nn.Module]:
    """The modules that are trained whole, by name.

    Raises:
        ValueError: an entry matches no module.
    """
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for entry in config.modules_to_save or ():
        hits = {name: m for name, m in modules.items() if matches((entry,), name)}
        if not hits:
            raise ValueError(f"modules_to_save {entry!r} matched no module; nearest names: {_nearest(entry, modules)}")
        found.update(hits)
    return found


def _selected(entries: Collection[str] | str, name: str) -> bool:
    return bool(re.fullmatch(entries, name)) if isinstance(entries, str) else matches(entries, name)


def _all_linear(config: NeatConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _excluded(name: str, config: NeatConfig) -> bool:
    if config.exclude_modules and _selected(config.exclude_modules, name):
        return True
    return any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in config.modules_to_save or ())


def is_target(name: str, model: nn.Module, modules: Mapping[str, nn.Module], config: NeatConfig) -> bool:
    """Whether the configuration means the module of that name."""
    if _excluded(name, config):
        return False
    assert config.target_modules is not None
    if _all_linear(config):
        module = modules[name]
        linear = isinstance(module, (nn.Linear, FusedNeatLinear)) or is_conv1d(module)
        selected = linear and not _in_output_head(name, model, modules)
    else:
        selected = _selected(config.target_modules, name)
    return selected and _layer_selected(name, config)


def _in_output_head(name: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is not None:
        return modules[name] is head
    return name.split(".")[0] in CLASSIFIER_HEADS


def _layer_selected(name: str, config: NeatConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    return any(_layer_index(name, pattern) in config.layer_indices() for pattern in _layer_patterns(config))


def _layer_patterns(config: NeatConfig) -> tuple[str, ...]:
    patterns = config.layers_pattern or r"[^.]*"
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _layer_index(name: str, pattern: str) -> int | None:
    # The lazy prefix finds the first number, the layer index, not that of an expert inside the layer.
    match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _rank(name: str, config: NeatConfig, used: set[str]) -> int:
    if (found := by_pattern(config.rank_pattern, name)) is None:
        return config.r
    used.add(found[0])
    return found[1]


def _check_entries_used(
    names: list[str], matched: list[str], modules: dict[str, nn.Module], config: NeatConfig
) -> None:
    linear = [name for name in names if isinstance(modules[name], nn.Linear) or is_conv1d(modules[name])]
    targets = config.target_modules
    if isinstance(targets, str):
        if not matched:
            raise ValueError(f"target_modules {targets!r} matched no layer; nearest names: {_nearest(targets, linear)}")
    else:
        for entry in targets or ():
            if not any(matches((entry,), name) for name in names):
                raise ValueError(f"target_modules {entry!r} matched no layer; nearest names: {_nearest(entry, linear)}")
        if not matched:
            raise ValueError(
                f"target_modules {list(targets or ())} matched no layer once exclude_modules, modules_to_save and "
                f"layers_to_transform were applied; nearest names: {_nearest(next(iter(targets or ('',))), linear)}"
            )
    _check_layers_used(matched, config)
    exclude = config.exclude_modules or ()
    for entry in (exclude,) if isinstance(exclude, str) else exclude:
        if not any(_selected(exclude if isinstance(exclude, str) else (entry,), name) for name in names):
            raise ValueError(f"exclude_modules {entry!r} matched no module; nearest names: {_nearest(entry, linear)}")


def _check_layers_used(matched: list[str], config: NeatConfig) -> None:
    found = {
        pattern: {index for name in matched if (index := _layer_index(name, pattern)) is not None}
        for pattern in _layer_patterns(config)
    }
    if config.layers_pattern and (unused := [pattern for pattern, indices in found.items() if not indices]):
        raise ValueError(f"layers_pattern {unused} matched none of the adapted layers, for example {matched[:5]}")
    known = set[int]().union(*found.values())
    if missing := [index for index in config.layer_indices() if index not in known]:
        raise ValueError(f"layers_to_transform {missing} matched no layer; adapted are {sorted(known)}")


def _nearest(entry: str, names: Iterable[str]) -> list[str]:
    # Compare with the last part too, since that is what a suffix is written for.
    known = list(names)
    by_suffix = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = nearest(entry, [*by_suffix, *known], count=10)
    return list(dict.fromkeys(by_suffix.get(name, name) for name in close))[:5]


def check_adaptable(name: str, module: nn.Module, parent: nn.Module) -> None:
    """Raise ValueError or TypeError unless the module can be adapted where it is."""
    if isinstance(module, FusedNeatLinear):
        raise ValueError(f"{name} is adapted already: call remove_neat() or merge_neat() first")
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        raise ValueError(
            f"{name} cannot be adapted: {type(parent).__name__} reads its weight without calling it, so that the "
            "adapter would have no effect; name it in exclude_modules"
        )
    if parametrize.is_parametrized(module):
        raise ValueError(f"{name} cannot be adapted: expected a plain weight, got a parametrized one")
    try:
        checked_weight(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} cannot be adapted: {error}") from None
