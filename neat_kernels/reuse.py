"""The explicit form of feature reuse in training: one features pass for a block of micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from neat_kernels.cache import ReusedFeatures
from neat_kernels.layer import FusedNeatLinear, neat_layers


@contextmanager
def reuse_features(model: nn.Module) -> Iterator[None]:
    """Compute the features of every Neat layer in `model` once for all forwards and backwards inside the block.

    For gradient accumulation: dH is collected over the micro-batches and goes through the features' backward once,
    when the block ends; only then do A and the chain have their gradients. Take no optimizer step inside, and no
    zero_grad(), which would clear B's gradient but not the collected dH. What reduces gradients over processes in the
    backward does not see these late ones: FSDP and DistributedDataParallel are refused.

    Args:
        model: a model with FusedNeatLinear layers, or one such layer.

    Raises:
        ValueError: `model` has no FusedNeatLinear layer.
        RuntimeError: blocks are nested, a parameter changes inside, or the model is parallel: sharded parameters are
            refused here, a DistributedDataParallel at the first forward inside.
    """
    named = [(name, layer) for name, layer in neat_layers(model) if not layer.merged]
    layers = [layer for _, layer in named]
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "reuse_features() is for training; in inference mode an eval() model caches its features by itself"
        )
    if not layers:
        raise ValueError("expected a model with unmerged FusedNeatLinear layers, got none")
    if any(layer._reused is not None for layer in layers):
        raise RuntimeError("reuse_features() blocks cannot be nested")
    for name, layer in named:
        _check_own_parameters(name or "the layer", layer)
    steps = register_optimizer_step_post_hook(functools.partial(_invalidate_stepped, layers))
    try:
        for layer in layers:
            with torch.enable_grad():
                H = layer._features(layer._matrix())
            layer._reused = ReusedFeatures.of(H, layer._feature_parameters())
        yield
        waiting = [(layer._reused, layer._feature_parameters()) for layer in layers if layer._reused is not None]
        # Every layer is checked before the first gradient is written.
        for reused, parameters in waiting:
            reused.checked(parameters)
        for reused, _ in waiting:
            reused.flush()
    finally:
        steps.remove()
        for layer in layers:
            layer._reused = None


def _check_own_parameters(name: str, layer: FusedNeatLinear) -> None:
    if not layer._cache.trusts(layer._feature_parameters()):
        raise RuntimeError(
            f"{name}: expected the parameters that the layer was made, moved or loaded with, got others; FSDP, which "
            "puts its own in place, would not reduce the gradients that are written at the end of the block; "
            "after an assignment of yours call invalidate()"
        )


def _invalidate_stepped(
    layers: list[FusedNeatLinear], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # Fused optimizers change values without a new version.
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        if layer._reused is not None and any(id(p) in stepped for p in layer._feature_parameters()):
            layer._reused.invalidate()
