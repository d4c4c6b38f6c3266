"""Put Neat layers into a model, take them out, or leave plain layers with W + ΔW behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TypeVar

from torch import nn

from neat_kernels.adapters.config import NeatConfig
from neat_kernels.adapters.match import Target, find_modules_to_save, find_targets
from neat_kernels.adapters.names import ADAPTED, unwrapped
from neat_kernels.adapters.parallel import check_not_copied, check_whole
from neat_kernels.base_layer import carry_hooks
from neat_kernels.layer import FusedNeatLinear, neat_layers
from neat_kernels.merge import SEEDS, check_rounding, draw_seed
from neat_kernels.options import LayerOptions

Model = TypeVar("Model", bound=nn.Module)
Adapt = Callable[[nn.Module, LayerOptions], nn.Module]

# Plain attribute of the adapted model: names of the parameters that were trainable before.
_BEFORE = "_neat_trainable_before"
# Plain attribute of the adapted model: names of the modules that are trained whole.
_SAVED = "_neat_modules_to_save"


def neat_layer(linear: nn.Module, options: LayerOptions) -> nn.Module:
    """The Neat layer that takes the place of a linear layer."""
    return FusedNeatLinear.from_linear(linear, **asdict(options))


def apply_neat(model: Model, config: NeatConfig) -> Model:
    """Freeze a model and put a Neat layer in the place of every layer that the configuration names.

    The weights are shared, not copied, and keep their names in the state dict; the model computes what it did before
    until it is trained. Forward and backward hooks of a replaced layer stay with it.

    Args:
        model: any module with nn.Linear (or transformers' Conv1D) inside; changed in place.
        config: which layers, and how.

    Returns:
        The same model. Only the adapters and `modules_to_save` are trainable, those of an earlier call included.

    Raises:
        ValueError: nothing matches, an entry matches nothing, a layer cannot be adapted, or the model is sharded or in
            DistributedDataParallel already. The model is unchanged then.
        TypeError: a matched module is no linear layer. The model is unchanged then.
    """
    check_whole(model)
    check_not_copied(model)
    return insert(model, find_targets(model, config), find_modules_to_save(model, config))


def insert(model: Model, targets: list[Target], saved: Mapping[str, nn.Module], adapt: Adapt = neat_layer) -> Model:
    """`apply_neat` once it is known which layers are adapted, how, and which modules are trained whole, by name."""
    root = unwrapped(model)
    earlier = {name: root.get_submodule(name) for name in modules_to_save(root)}
    _check_saved(root, targets, {**earlier, **saved})
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        layers = [_adapted(target, adapt) for target in targets]
    except BaseException:
        for p in trainable.values():
            p.requires_grad_(True)
        raise
    # A second call, for layers with other options, must not freeze what the first one trains.
    kept = [m for m in model.modules() if isinstance(m, ADAPTED)] + list(earlier.values())
    keep = {id(p) for module in kept for p in module.parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(id(p) in keep)
    for target, layer in zip(targets, layers, strict=True):
        for name in target.names:
            _replace(model, name, layer)
    for p in [p for module in saved.values() for p in module.parameters() if p.is_floating_point()]:
        p.requires_grad_(True)
    model.__dict__.setdefault(_BEFORE, tuple(trainable))
    # Under the names that the model has without torch's wrappers, which come and go.
    names = {id(module): name for name, module in root.named_modules()}
    root.__dict__[_SAVED] = tuple(dict.fromkeys((*earlier, *(names[id(module)] for module in saved.values()))))
    return model


def modules_to_save(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that `apply_neat` made trainable as a whole."""
    return model.__dict__.get(_SAVED, ())


def remove_neat(model: Model) -> Model:
    """Put the original modules back, with their weights and the requires_grad flags from before `apply_neat`.

    Args:
        model: a model with Neat layers inside, merged or not; changed in place.

    Returns:
        The same model; the adapters are gone. Biases and `modules_to_save` that were trained keep their values.

    Raises:
        ValueError: the model has no Neat layer, or is sharded.
    """
    for names, layer in _neat_layers_by_name(model):
        linear = _restore(layer, layer.base_weight)
        for name in names:
            _replace(model, name, linear)
    for module in model.modules():
        module.__dict__.pop(_SAVED, None)
        trainable = module.__dict__.pop(_BEFORE, None)
        if trainable is not None:
            for name, p in module.named_parameters():
                p.requires_grad_(name in trainable)
    return model


def merge_neat(model: Model, *, rounding: str = "nearest", seed: int | None = None) -> Model:
    """Leave plain layers with W + ΔW in the place of the Neat layers, for inference.

    The sum is taken in float32 and rounded once; in bf16 and fp16 whatever of ΔW is below half a unit in the last place
    of W rounds away, which stochastic rounding keeps in the mean. Peak memory is one more weight, not one more model.

    Args:
        model: a model with Neat layers inside; changed in place. A layer that is merged keeps its merged weight.
        rounding: "nearest", or "stochastic" where every Neat layer has a bf16 weight.
        seed: of stochastic rounding, 0 to 2⁶³ - 1; the i-th layer takes seed + i. None draws one, which follows
            torch.manual_seed.

    Returns:
        The same model with plain layers.

    Raises:
        ValueError: the model has no Neat layer, a weight is shared with another module, a merged weight would not be
            finite, or a layer cannot be rounded as asked. The model is unchanged then.
        BackendUnavailableError: an explicit backend cannot run here. The model is unchanged then.
    """
    layers = _neat_layers_by_name(model)
    _check_not_tied(model, layers)
    _check_rounding(layers, rounding, seed)
    for _, layer in layers:
        if not layer.merged:
            # Whether it is finite does not depend on the rounding.
            layer.merged_weight()
    first = draw_seed() if rounding == "stochastic" and seed is None else seed
    while layers:
        # Nothing here may keep a replaced layer alive, or every W would stay beside every W + ΔW.
        names, layer = layers.pop()
        weight = layer.weight
        if not layer.merged:
            own = None if first is None else (first + len(layers)) % SEEDS
            weight = nn.Parameter(layer.merged_weight(rounding=rounding, seed=own), requires_grad=False)
        linear = _restore(layer, weight)
        for name in names:
            _replace(model, name, linear)
    for module in model.modules():
        module.__dict__.pop(_BEFORE, None)
        module.__dict__.pop(_SAVED, None)
    return model


def _adapted(target: Target, adapt: Adapt) -> nn.Module:
    layer = adapt(target.module, target.options)
    carry_hooks(target.module, layer)
    return layer


def _restore(layer: FusedNeatLinear, weight: nn.Parameter) -> nn.Module:
    linear = layer.plain_linear(weight)
    carry_hooks(layer, linear)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_saved(model: nn.Module, targets: list[Target], saved: Mapping[str, nn.Module]) -> None:
    layers: dict[str, nn.Module] = {target.names[0]: target.module for target in targets}
    layers.update({name: m for name, m in model.named_modules() if isinstance(m, ADAPTED)})
    owners = {id(m.base_weight if isinstance(m, ADAPTED) else m.weight): name for name, m in layers.items()}
    for name, module in saved.items():
        inside = {id(m) for m in module.modules()}
        if held := [layer for layer, m in layers.items() if id(m) in inside]:
            raise ValueError(
                f"modules_to_save {name!r} holds the adapted layer {held[0]!r}: expected a module to be trained whole "
                "or to have adapters inside, got both"
            )
        for p in module.parameters():
            if id(p) in owners:
                raise ValueError(
                    f"modules_to_save {name!r} shares its weight with the adapted layer {owners[id(p)]!r}: "
                    "a frozen weight was expected, got a trainable one"
                )


def _neat_layers_by_name(model: nn.Module) -> list[tuple[list[str], FusedNeatLinear]]:
    if isinstance(model, FusedNeatLinear):
        raise ValueError(
            "expected a model with Neat layers inside, got a single layer: use its merge() or plain_linear()"
        )
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    layers = [(names[id(layer)], layer) for _, layer in neat_layers(model)]
    if not layers:
        raise ValueError("expected a model with Neat layers inside, got none")
    check_whole(model)
    return layers


def _check_rounding(layers: list[tuple[list[str], FusedNeatLinear]], rounding: str, seed: int | None) -> None:
    for names, layer in layers:
        try:
            check_rounding(rounding, seed, layer.base_weight.dtype)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from None
        if layer.merged and rounding != "nearest":
            raise ValueError(
                f"{names[0]} is merged: expected an unmerged layer to round with {rounding!r}, call unmerge() first"
            )


def _check_not_tied(model: nn.Module, layers: list[tuple[list[str], FusedNeatLinear]]) -> None:
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        own = {"weight": module.base_weight} if isinstance(module, FusedNeatLinear) else module._parameters
        for p in own.values():
            if p is not None:
                users[id(p)].append(name or "the model itself")
    for _, layer in layers:
        sharing = users[id(layer.base_weight)]
        if len(sharing) > 1:
            raise ValueError(
                f"the weight of {sharing[0]} is tied to {', '.join(sharing[1:])}: merging would change or untie it; "
                "expected a weight of its own (clone it first)"
            )
