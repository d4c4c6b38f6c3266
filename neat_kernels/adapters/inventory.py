"""What a model with Neat layers has that belongs into a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neat_kernels.adapters.description import Description
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.fingerprint import fingerprint, gathered
from neat_kernels.adapters.match import CLASSIFIER_HEADS
from neat_kernels.adapters.names import ADAPTED, clean, named_modules, unwrapped
from neat_kernels.adapters.swap import modules_to_save
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.lora_layer import FusedLoraLinear
from neat_kernels.options import LayerOptions

Layer = FusedNeatLinear | FusedLoraLinear

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
_CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class Inventory:
    """The parts of a model that a file holds.

    Args:
        layers: adapted layers by the first of their names.
        modules: modules that are trained whole, by name.
        trained: other trained parameters, by name.
        description: what goes into adapter_config.json.
        every: names of all modules.
    """

    layers: dict[str, Layer]
    modules: dict[str, nn.Module]
    trained: dict[str, nn.Parameter]
    description: Description
    every: tuple[str, ...]

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of what is trained beside the adapters; a module with its buffers."""
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                yield f"{name}.{clean(key)}", value
        yield from self.trained.items()

    def fingerprints(self) -> dict[str, str]:
        """The hash of each base weight and of its bias, unless that is trained."""
        trained = {id(p) for p in self.trained.values()}
        found = {}
        for name, layer in self.layers.items():
            bias = None if layer.bias is None or id(layer.bias) in trained else gathered(f"{name}.bias", layer.bias)
            found[name] = fingerprint(gathered(f"{name}.weight", layer.base_weight), bias)
        return found


def take_inventory(model: nn.Module, *, lora: bool = False) -> Inventory:
    """Find the Neat layers of a model and what else is trained in it.

    Args:
        model: with adapted layers inside.
        lora: whether LoRA layers count too, which have no description.

    Raises:
        AdapterError: the model has no such layer inside, or LoRA layers that do not count.
    """
    model = unwrapped(model)
    if isinstance(model, ADAPTED):
        raise AdapterError("expected a model with adapted layers inside, got a single layer: put it into a module")
    layers = {clean(name): layer for name, layer in model.named_modules() if isinstance(layer, ADAPTED)}
    if not layers:
        raise AdapterError("expected a model with Neat layers inside, got none: call apply_neat() first")
    if not lora and (others := [name for name, layer in layers.items() if isinstance(layer, FusedLoraLinear)]):
        raise AdapterError(f"expected Neat layers alone, got a LoRA layer at {others[0]!r}: export_lora() saves those")
    inside = {f"{name}.{child}" for name, layer in layers.items() for child, _ in layer.named_modules() if child}
    modules = {name: module for name, module in named_modules(model).items() if name not in inside}
    saved = _saved(modules, model)
    _check_layers(layers, saved)
    trained = _trained(model, layers, saved)
    description = Description(
        layers={name: LayerOptions.of(layer) for name, layer in layers.items() if isinstance(layer, FusedNeatLinear)},
        modules_to_save=tuple(saved),
        trained_parameters=tuple(trained),
        base=_base(model),
        task_type=_task_type(model, saved, modules),
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        unsupported=tuple(_unsupported(modules, layers, saved, model)),
    )
    return Inventory(layers, saved, trained, description, tuple(modules))


def owners(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is held, by id; a merged layer holds its base weight."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        own: dict[str, nn.Parameter | None] = dict(module._parameters)
        if isinstance(module, FusedNeatLinear):
            own["weight"] = module.base_weight
        for key, p in own.items():
            if p is not None:
                found[id(p)].append(clean(f"{name}.{key}" if name else key))
    return found


def tied_outside(modules: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """Those of the modules that share a parameter with another part of the model."""
    holders = owners(model)
    return [
        name
        for name, module in modules.items()
        if any(not all(o.startswith(f"{name}.") for o in holders[id(p)]) for p in module.parameters())
    ]


def copied(name: str, value: Tensor) -> Tensor:
    """A contiguous copy on the CPU; AdapterError where the values are elsewhere or not finite."""
    copy = gathered(name, value).detach().cpu().clone(memory_format=torch.contiguous_format)
    if copy.is_floating_point() and not copy.isfinite().all():
        raise AdapterError(f"{name}: expected finite values, got NaN or infinity; such an adapter could not be loaded")
    return copy


def _saved(modules: dict[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for parent, module in {"": model, **modules}.items():
        for name in modules_to_save(module):
            full = clean(f"{parent}.{name}" if parent else name)
            if full not in modules:
                raise AdapterError(
                    f"expected the modules_to_save of apply_neat(), got none that is called {full!r} now"
                )
            found[full] = modules[full]
    return found


def _check_layers(layers: dict[str, Layer], saved: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if layer.base_weight.requires_grad:
            raise AdapterError(f"{name}: expected a frozen base weight, got one that is trainable")
        if whole := [other for other in saved if name.startswith(f"{other}.")]:
            raise AdapterError(f"{name}: expected a layer outside of modules_to_save, got one in {whole[0]!r}")


def _trained(model: nn.Module, layers: dict[str, Layer], saved: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    elsewhere = {id(p) for module in saved.values() for p in module.parameters()}
    for layer in layers.values():
        elsewhere.update(id(p) for name, p in layer.named_parameters() if name.startswith(("neat_", "lora_")))
    return {clean(name): p for name, p in model.named_parameters() if p.requires_grad and id(p) not in elsewhere}


def _base(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _task_type(model: nn.Module, saved: dict[str, nn.Module], modules: dict[str, nn.Module]) -> str | None:
    """The task, for a model that PEFT's class for it can wrap."""
    kind = type(model).__name__
    if kind.endswith(_CLASSIFIER):
        # PEFT trains every module whole whose name ends so, whether the configuration has it or not.
        heads = {name for name in modules if name.endswith(CLASSIFIER_HEADS)}
        return "SEQ_CLS" if heads and heads <= set(saved) else None
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)


def _unsupported(
    modules: dict[str, nn.Module], layers: dict[str, Layer], saved: dict[str, nn.Module], model: nn.Module
) -> Iterator[str]:
    if any(layer.transposed for layer in layers.values()):
        yield "Conv1D layers"
    names = defaultdict(list)
    for name, module in modules.items():
        names[id(module)].append(name)
    if any(len(names[id(layer)]) > 1 for layer in layers.values()):
        yield "a layer that the model uses under several names"
    if tied := tied_outside(saved, model):
        yield f"modules_to_save {tied[0]}, which shares a parameter with another part of the model"
    if nested := [name for name in saved if any(name.startswith(f"{other}.") for other in saved)]:
        yield f"modules_to_save {nested[0]} inside another one"
    # PEFT takes every module whose name ends so, after a dot or not.
    if extra := [name for name in modules if name not in saved and name.endswith(tuple(saved))]:
        yield f"modules_to_save {', '.join(saved)}, which PEFT would take {extra[0]} for too"
