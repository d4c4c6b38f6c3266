"""Optimizer parameter groups of an adapted model: A, B and the chain, each with a learning rate of its own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

# Parts of a parameter's name, of our own layers and of PEFT's PEANuT, NEAT and LoRA.
_PARTS = {
    "A": ("neat_A", "peanut_A", "lora_A", "lora_embedding_A"),
    "B": ("neat_B", "peanut_B", "lora_B", "lora_embedding_B"),
    "chain": ("neat_encoders", "neat_decoders", "peanut_encoders", "peanut_decoders"),
}
_GROUP_OF = {part: group for group, parts in _PARTS.items() for part in parts}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    lr_A: float | None = None,
    lr_B: float | None = None,
    lr_chain: float | None = None,
    lr_other: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trained parameters of a model as groups for any torch optimizer.

    A group is {"name", "params", "lr", "weight_decay"}; the names are A, B, chain (encoders and decoders), other
    (modules_to_save and whatever else is trained) and other_vectors (biases and norms, which are not decayed).

    Args:
        model: a model with Neat layers, fused LoRA layers, or PEFT's PEANuT, NEAT or LoRA layers.
        lr: learning rate of the groups that have none of their own.
        lr_A: of A (LoRA: lora_A).
        lr_B: of B (LoRA: lora_B).
        lr_chain: of the encoders and decoders.
        lr_other: of other and other_vectors.
        weight_decay: of every group but other_vectors.

    Returns:
        The groups that are not empty, in the order above; each trained parameter is in exactly one.

    Raises:
        TypeError: `model` is no module, or a rate is no number.
        ValueError: a rate is negative or not finite, nothing is trained, no trained parameter belongs to an adapter,
            or a rate is given to a group that has no trained parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}")
    own = {"A": lr_A, "B": lr_B, "chain": lr_chain, "other": lr_other}
    given = {f"lr_{name}": rate for name, rate in own.items() if rate is not None}
    for name, rate in {"lr": lr, **given, "weight_decay": weight_decay}.items():
        _check_rate(name, rate)
    groups = _grouped(model)
    for option in given:
        group = option.removeprefix("lr_")
        if not any(name.startswith(group) for name in groups):
            raise ValueError(
                f"{option} was given, but no parameter of the group {group!r} is trained: got {_count(groups)}"
            )
    rates = {**own, "other_vectors": lr_other}
    return [
        {
            "name": name,
            "params": params,
            "lr": lr if rates[name] is None else rates[name],
            "weight_decay": 0.0 if name == "other_vectors" else weight_decay,
        }
        for name, params in groups.items()
    ]


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(rate).__name__}")
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {rate}")


def _grouped(model: nn.Module) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {name: [] for name in (*_PARTS, "other", "other_vectors")}
    for name, p in model.named_parameters():
        if p.requires_grad:
            of_adapter = (_GROUP_OF[part] for part in name.split(".") if part in _GROUP_OF)
            groups[next(of_adapter, "other" if p.ndim > 1 else "other_vectors")].append(p)
    found = {name: params for name, params in groups.items() if params}
    if not found:
        raise ValueError("expected a model with trained parameters, got none that requires a gradient")
    if not found.keys() & _PARTS.keys():
        raise ValueError(f"expected trained adapters (Neat, PEANuT, NEAT or LoRA), got {_count(found)}")
    return found


def _count(groups: dict[str, list[Tensor]]) -> str:
    return ", ".join(f"{len(params)} of {name}" for name, params in groups.items())
