"""Merging: W' = W + Σ_a ΔW_a, every ΔW of the original W, and back to the very tensors from before.

A quantised W is dequantised whole while its layer is merged, and W' is quantised again in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.integrations.peft.bases import Packed, packed_weight
from neat_kernels.integrations.peft.packed_features import packed_features
from neat_kernels.torch_backend.gemm import ieee_fp32

# What bitsandbytes keeps of an int8 weight beside it.
_INT8_STATE = ("CB", "SCB")


@dataclass(frozen=True)
class Original:
    """A base layer at one time: the module, its weight, and what its library keeps beside the weight.

    Args:
        base: the base layer.
        weight: its weight; None where merging replaces the module.
        of_weight: attributes of the weight, which PEFT changes in place.
        of_state: attributes of a bitsandbytes state.
    """

    base: nn.Module
    weight: nn.Parameter | None
    of_weight: dict[str, Any]
    of_state: dict[str, Any]

    @classmethod
    def of(cls, layer: Any) -> Original:
        """The base of a layer of PEFT as it is now."""
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        state = getattr(base, "state", None) if "bitsandbytes" in sys.modules else None
        of_state = {} if state is None else {name: getattr(state, name) for name in _INT8_STATE}
        return cls(base, weight, {} if weight is None else dict(vars(weight)), of_state)

    def put_back(self, layer: Any) -> None:
        """Make it the base of the layer again, on the device where the base is now."""
        now = layer.get_base_layer()
        device = device_of(now)
        if now is not self.base:
            layer.base_layer = self.base
        if self.weight is not None:
            del self.base.weight
            self.base.register_parameter("weight", self.weight)
            vars(self.weight).update(self.of_weight)
        for name, value in self.of_state.items():
            setattr(self.base.state, name, value)
        if device_of(self.base) != device:
            self.base.to(device)


def device_of(base: nn.Module) -> torch.device:
    """Where the weight of a base layer is."""
    if (packed := packed_weight(base)) is not None:
        return packed.device
    return base.weight.device  # type: ignore[return-value]


def packed_base(layer: Any) -> Packed | None:
    """The quantised W of a layer of PEFT, or None."""
    return packed_weight(layer.get_base_layer())


def merge_from_original(layer: Any, names: Sequence[str], write: Callable[[Sequence[str]], None]) -> None:
    """Merge adapters beside those that are merged already.

    Args:
        layer: a layer of PEFT.
        names: adapters that are not merged.
        write: puts the W' of the adapters of these names in the place of W; if it raises, nothing is changed.
    """
    now = Original.of(layer)
    original = layer._neat_original or now
    try:
        original.put_back(layer)
        write([*layer.merged_adapters, *names])
    except BaseException:
        now.put_back(layer)
        raise
    layer._neat_original = original
    layer.merged_adapters.extend(names)


def unmerge(layer: Any) -> None:
    """Put the tensors from before the first merge back."""
    layer._neat_original.put_back(layer)
    layer._neat_original = None
    layer.merged_adapters.clear()


@contextmanager
def original_base(layer: Any) -> Iterator[None]:
    """Within it a merged layer has the base from before merging."""
    if layer._neat_original is None:
        yield
        return
    now = Original.of(layer)
    layer._neat_original.put_back(layer)
    try:
        yield
    finally:
        now.put_back(layer)


def delta_of_packed(layer: Any, name: str) -> Tensor:
    """ΔW [N,K] of one adapter in float32, from the W that the base has now."""
    network = layer._network(name)
    with torch.no_grad(), ieee_fp32(network.A.device):
        branch = network.branch(packed_features(layer.get_base_layer(), network.A, **network.shape))
        return (branch.up.float() @ branch.down.float().t()).mul_(branch.scaling)


def quantise_merged(layer: Any, safe_merge: bool, names: Sequence[str]) -> None:
    """Quantise W + ΣΔW in the place of W.

    Args:
        layer: a fused layer of PEFT over a quantised base.
        safe_merge: refuse a sum that is not finite.
        names: the adapters.

    Raises:
        NotImplementedError: this PEFT, or this quantisation, cannot quantise again.
        ValueError: the sum is not finite.
    """
    backend = _backend(layer)
    base = layer.get_base_layer()
    packed = packed_weight(base)
    assert packed is not None
    W = torch.empty(packed.shape, dtype=torch.float32, device=packed.device)
    for rows, block in packed.blocks():
        W[rows] = block
    for name in names:
        W += delta_of_packed(layer, name)
    if safe_merge and not torch.isfinite(W).all():
        raise not_finite(names)
    backend.set_base_weight(layer, W.to(_dtype(base)))


def not_finite(names: Sequence[str]) -> ValueError:
    """The refusal of a W' that is not finite, in PEFT's words."""
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken: nothing was merged"
    )


def quantization_of(model: nn.Module) -> Mapping[str, Any]:
    """What PEFT must know of a model to quantise a weight of it again."""
    try:
        from peft.utils.quantization_utils import get_quantization_kwargs
    except ImportError:
        return {}
    return get_quantization_kwargs(model)


def _backend(layer: Any) -> Any:
    base = layer.get_base_layer()
    kind = type(base).__name__
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        import peft

        raise NotImplementedError(
            f"merging into {kind} needs a PEFT that quantises merged weights, 0.20 or newer; got {peft.__version__}"
        ) from None
    try:
        backend = resolve_quantization_backend(base, **layer._neat_quantization)
    except ValueError as error:
        raise NotImplementedError(
            f"merging into {kind} needs a model that transformers quantised, which knows how to do it again: {error}"
        ) from None
    if backend is None or not backend.supports_merge:
        raise NotImplementedError(f"PEFT cannot quantise a merged weight of {kind}: got {backend!r}")
    return backend


def _dtype(base: Any) -> torch.dtype:
    """What the weight was quantised from, as far as the base still knows."""
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if state is not None:
        return state.dtype
    if type(base).__name__ == "HQQLinear":
        return base.compute_dtype
    # int8 of bitsandbytes is made of fp16.
    dtype: torch.dtype = base.weight.dtype
    return dtype if dtype.is_floating_point else torch.float16
