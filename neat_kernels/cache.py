"""When features may be reused, and the two forms of reuse: the inference cache and an explicit block in training.

The cache lives in eval() with gradients disabled and holds the rounded factors D and U. It trusts only parameters that
the layer itself put in place: FSDP2, functional_call and their like swap parameter objects in, and FSDP2 changes their
values without changing identity or version.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

Factors = tuple[Tensor, Tensor]
Versions = tuple[tuple["weakref.ref[Tensor]", int], ...]


def versions(tensors: Iterable[Tensor]) -> Versions:
    """What identifies the values of `tensors`: the objects, weakly, and their version counters."""
    return tuple((weakref.ref(t), t._version) for t in tensors)


def unchanged(before: Versions, tensors: Iterable[Tensor]) -> bool:
    """Whether `tensors` are the objects of `before`, unmodified in place (writes through .data are invisible)."""
    now = tuple(tensors)
    return len(now) == len(before) and all(
        ref() is t and version == t._version for (ref, version), t in zip(before, now, strict=True)
    )


class _OptimizerSteps:
    """How many optimizer steps this process has taken since it first cached features."""

    count = 0

    @staticmethod
    @functools.cache
    def watch() -> None:
        """Start counting, once: fused optimizers change values without a new version, so a cache must hear of steps."""
        register_optimizer_step_post_hook(_OptimizerSteps._add)

    @staticmethod
    def _add(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _OptimizerSteps.count += 1


class FeatureCache:
    """The detached factors D and U of one layer, valid for the parameters and options they were made from."""

    def __init__(self) -> None:
        self._trusted: tuple[weakref.ref[Tensor], ...] = ()
        self._entry: tuple[Versions, tuple[object, ...], Factors] | None = None

    def reset(self, parameters: Iterable[Tensor]) -> None:
        """Drop the factors and trust exactly `parameters` from now on."""
        self.drop()
        self._trusted = tuple(weakref.ref(p) for p in parameters if type(p) is nn.Parameter)

    @property
    def factors(self) -> Factors | None:
        """What is cached, valid or not."""
        return None if self._entry is None else self._entry[2]

    def drop(self) -> None:
        """Drop the factors."""
        self._entry = None

    def forget(self) -> None:
        """Drop everything, weak references included: torch.utils.swap_tensors refuses tensors that have one."""
        self.drop()
        self._trusted = ()

    def trusts(self, parameters: tuple[Tensor, ...]) -> bool:
        """Whether these are the parameters that the layer itself put in place."""
        return len(parameters) == len(self._trusted) and all(
            ref() is p for ref, p in zip(self._trusted, parameters, strict=True)
        )

    def usable(self, parameters: tuple[Tensor, ...]) -> bool:
        """Whether the cache may be read and written for these parameters, here and now."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or _is_traced():
            return False
        if not self.trusts(parameters) or any(p.is_inference() for p in parameters):
            return False
        return not (parameters[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def get(self, parameters: tuple[Tensor, ...], options: tuple[object, ...]) -> Factors | None:
        """The cached factors if they still hold for these parameters and options, else None."""
        if self._entry is None:
            return None
        before, key, factors = self._entry
        return factors if key == (_OptimizerSteps.count, *options) and unchanged(before, parameters) else None

    def put(self, parameters: tuple[Tensor, ...], options: tuple[object, ...], factors: Factors) -> Factors:
        """Keep `factors` for these parameters and options."""
        _OptimizerSteps.watch()
        self._entry = versions(parameters), (_OptimizerSteps.count, *options), factors
        return factors


def _is_traced() -> bool:
    modes = torch._C._TorchDispatchModeKey
    fake_or_proxy = (torch._C._get_dispatch_mode(mode) for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL))
    return torch._C._is_tracing() or any(mode is not None for mode in fake_or_proxy)


@dataclass
class ReusedFeatures:
    """One layer's features inside a `reuse_features` block: a leaf that collects dH, and the graph waiting for it."""

    features: Tensor
    leaf: Tensor
    versions: Versions

    @classmethod
    def of(cls, features: Tensor, parameters: tuple[Tensor, ...]) -> ReusedFeatures:
        """Cut `features` off their graph, so that every backward inside the block ends at the leaf."""
        leaf = features.detach().requires_grad_(features.requires_grad)
        return cls(features, leaf, versions(parameters))

    def checked(self, parameters: tuple[Tensor, ...]) -> Tensor:
        """The leaf, if no parameter has changed since the block began."""
        if not unchanged(self.versions, parameters):
            raise RuntimeError(
                "a Neat parameter changed inside reuse_features(): the reused features are stale; "
                "leave the block before optimizer.step() or load_state_dict()"
            )
        return self.leaf

    def invalidate(self) -> None:
        """Make every further use raise: values changed in a way that leaves identity and version alone."""
        self.versions = ()

    def flush(self) -> None:
        """Carry the collected dH through the features' backward into the gradients of A and the chain."""
        if self.leaf.grad is not None:
            torch.autograd.backward(self.features, self.leaf.grad)


def refuse_reuse_in_parallel(layer: nn.Module) -> None:
    """Raise where a layer with reused features runs as a replica or inside DistributedDataParallel."""
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "reuse_features() cannot be used under nn.DataParallel, whose replicas have parameters of their own"
        )
    # Set during its forward; torch's compiler asks for it too.
    if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise RuntimeError(
            "reuse_features() cannot be used under DistributedDataParallel, which does not reduce the gradients that "
            "are written at the end of the block"
        )
