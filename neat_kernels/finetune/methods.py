"""What each method makes of a pretrained model: which of its weights train, and what is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from neat_kernels.finetune.settings import LM, Settings
from neat_kernels.usage import UsageError

ALL_LINEAR = "all-linear"

Targets = Sequence[str]


def prepare(method: str, backbone: nn.Module, settings: Settings, targets: Targets) -> nn.Module:
    """Turn a freshly loaded backbone into the one that `method` trains.

    Args:
        method: probe, lora, neat or full.
        backbone: a transformers model as it was loaded; it is changed.
        settings: the adapters' hyperparameters.
        targets: names of the linear layers to adapt, or ("all-linear",).

    Returns:
        The backbone, in which exactly the weights to train require a gradient; these are float32 whatever the dtype
        of the frozen ones.
    """
    prepared = _PREPARE[method](backbone, settings, targets)
    for parameter in prepared.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return prepared


def try_adapters(backbone: nn.Module, settings: Settings, targets: Targets) -> None:
    """Raise UsageError if a method of the run cannot put its adapters into the model, which is of no more use then.

    Args:
        backbone: a transformers model as it was loaded.
        settings: the run.
        targets: names of the linear layers to adapt.
    """
    import neat_kernels as nk

    if "neat" in settings.methods:
        nk.remove_neat(prepare_neat(backbone, settings, targets))
    if "lora" in settings.methods:
        prepare_lora(backbone, settings, targets)


def prepare_probe(backbone: nn.Module, settings: Settings, targets: Targets) -> nn.Module:
    """Freeze everything: only the head outside the backbone trains."""
    return backbone.requires_grad_(False)


def prepare_full(backbone: nn.Module, settings: Settings, targets: Targets) -> nn.Module:
    """Train every weight."""
    return backbone.requires_grad_(True)


def prepare_lora(backbone: nn.Module, settings: Settings, targets: Targets) -> nn.Module:
    """LoRA as PEFT has it, with lora_alpha chosen so that the update is multiplied by `scaling`, as Neat's is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.scaling * settings.r,
        lora_dropout=0.0,
        bias="none",
        target_modules=as_targets(targets),
        task_type="CAUSAL_LM" if settings.task == LM else None,
    )
    try:
        return get_peft_model(backbone, config)
    except ValueError as error:
        raise UsageError(f"PEFT cannot put LoRA into this model: {error}") from error


def prepare_neat(backbone: nn.Module, settings: Settings, targets: Targets) -> nn.Module:
    """Neat, by this package."""
    import neat_kernels as nk

    config = nk.NeatConfig(
        r=settings.r,
        target_modules=as_targets(targets),
        orientation=settings.orientation,
        depth=settings.depth,
        activation=settings.activation,
        scaling=settings.scaling,
    )
    try:
        return nk.apply_neat(backbone, config)
    except (ValueError, TypeError) as error:
        raise UsageError(f"Neat cannot be put into this model: {error}") from error


def as_targets(targets: Targets) -> Any:
    """The targets as PEFT and Neat take them: a list of names, or the one word all-linear."""
    return ALL_LINEAR if tuple(targets) == (ALL_LINEAR,) else list(targets)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(parameters: Sequence[torch.Tensor]) -> int:
    """Number of scalars."""
    return sum(parameter.numel() for parameter in parameters)


_PREPARE: dict[str, Callable[[nn.Module, Settings, Targets], nn.Module]] = {
    "probe": prepare_probe,
    "lora": prepare_lora,
    "neat": prepare_neat,
    "full": prepare_full,
}
