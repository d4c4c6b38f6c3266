"""Merging over a quantised W: W' = Q(W + Σ_a ΔW_a), every ΔW of the original W, and back to the very tensors of Q(W).

W and W' are dequantised whole while a layer is merged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from neat_kernels.integrations.peft.bases import Packed, packed_weight, plain_weight
from neat_kernels.integrations.peft.packed_features import packed_features
from neat_kernels.torch_backend.gemm import ieee_fp32

# What bitsandbytes keeps of an int8 weight beside it.
_INT8_STATE = ("CB", "SCB")


@dataclass(frozen=True)
class Original:
    """A base layer before merging: the module, its weight, and what its library keeps beside the weight.

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
    def of(cls, base: Any) -> Original:
        """The base layer as it is now."""
        weight = base._parameters.get("weight")
        state = getattr(base, "state", None) if sys.modules.get("bitsandbytes") else None
        of_state = {} if state is None else {name: getattr(state, name) for name in _INT8_STATE}
        return cls(base, weight, {} if weight is None else dict(vars(weight)), of_state)

    def put_back(self, layer: Any) -> None:
        """Make it the base of a layer again, on the device where the base is now."""
        now = layer.base_layer
        device = None if (packed := packed_weight(now)) is None else packed.device
        if now is not self.base:
            layer.base_layer = self.base
        if self.weight is not None:
            del self.base.weight
            self.base.register_parameter("weight", self.weight)
            vars(self.weight).update(self.of_weight)
        for name, value in self.of_state.items():
            setattr(self.base.state, name, value)
        if device is not None and (packed := packed_weight(self.base)) is not None and packed.device != device:
            self.base.to(device)


def packed_base(layer: Any) -> Packed | None:
    """The quantised W of a layer of PEFT, or None."""
    base = layer.get_base_layer()
    return None if plain_weight(base) is not None else packed_weight(base)


def dequantised(packed: Packed) -> Tensor:
    """W [N,K] in float32, a copy."""
    W = torch.empty(packed.shape, dtype=torch.float32, device=packed.device)
    for rows, block in packed.blocks():
        W[rows] = block
    return W


def delta_of_packed(layer: Any, name: str) -> Tensor:
    """ΔW [N,K] of one adapter in float32, from the W that the base has now."""
    network = layer._network(name)
    with torch.no_grad(), ieee_fp32(network.A.device):
        branch = network.branch(packed_features(layer.get_base_layer(), network.A, **network.shape))
        return (branch.up.float() @ branch.down.float().t()).mul_(branch.scaling)


def merge_packed(layer: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Quantise W + ΣΔW in W's place.

    Args:
        layer: a fused layer of PEFT over a quantised base.
        safe_merge: refuse a sum that is not finite.
        adapter_names: those to merge; None means the active ones.

    Raises:
        NotImplementedError: this PEFT, or this quantisation, cannot quantise again.
        ValueError: the sum is not finite. Nothing is changed then.
    """
    names = [name for name in check_adapters_to_merge(layer, adapter_names) or [] if name in layer._known_names()]
    if not names:
        return
    backend = _backend(layer)
    now = Original.of(layer.base_layer)
    original = layer._neat_original or now
    try:
        original.put_back(layer)
        packed = packed_weight(original.base)
        assert packed is not None
        W = dequantised(packed)
        for name in (*layer.merged_adapters, *names):
            W += delta_of_packed(layer, name)
        if safe_merge and not torch.isfinite(W).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken: nothing was merged"
            )
        backend.set_base_weight(layer, W.to(_dtype(original.base)))
    except BaseException:
        now.put_back(layer)
        raise
    layer._neat_original = original
    layer.merged_adapters.extend(names)


def unmerge_packed(layer: Any) -> None:
    """Put the tensors from before the first merge back."""
    layer._neat_original.put_back(layer)
    layer._neat_original = None
    layer.merged_adapters.clear()


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """What PEFT must know of a model to quantise a weight of it again."""
    try:
        from peft.utils.quantization_utils import get_quantization_kwargs
    except ImportError:
        return {}
    return get_quantization_kwargs(model)


def _backend(layer: Any) -> Any:
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        import peft

        raise NotImplementedError(
            f"expected a PEFT that quantises merged weights (0.20 or newer), got {peft.__version__}"
        ) from None
    base = layer.base_layer
    kind = type(base).__name__
    try:
        backend = resolve_quantization_backend(base, **layer._neat_quantization)
    except ValueError as error:
        raise NotImplementedError(
            f"cannot merge into {kind}: expected a model that transformers quantised, which knows how to do it again; "
            f"PEFT says: {error}"
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
    weight = base.weight
    # int8 of bitsandbytes is made of fp16.
    return weight.dtype if weight.dtype.is_floating_point else torch.float16


@contextmanager
def original_base(layer: Any) -> Iterator[None]:
    """Within it a merged layer has the base from before merging."""
    if layer._neat_original is None:
        yield
        return
    now = Original.of(layer.base_layer)
    layer._neat_original.put_back(layer)
    try:
        yield
    finally:
        now.put_back(layer)
