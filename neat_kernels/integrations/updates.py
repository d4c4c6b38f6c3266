"""How large the update ΔW of each adapted layer is, from its factors: ΔW itself is never formed.

‖ΔW‖_F² = tr((UᵀU)·(DᵀD)) = Σ_ij (UᵀU)_ij·(DᵀD)_ij        ΔW = U·Dᵀ, D [K,r], U [N,r] with the scaling in it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neat_kernels.base_layer import as_matrix
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.lora_layer import FusedLoraLinear
from neat_kernels.vocabulary import arrange

# Elements of W that are read in fp32 at one time.
_BLOCK = 1 << 24
_SHARDED = "a parameter of it is no whole matrix here, as where a model is sharded"


@dataclass(frozen=True)
class Update:
    """The update of one layer, all of its active adapters together.

    Args:
        delta_norm: ‖ΔW‖_F.
        weight_norm: ‖W‖_F of the frozen weight; None where it cannot be read.
        features: columns of H that are behind a relu.
        dead: those of them that are zero in every row, so that no gradient reaches them.
    """

    delta_norm: float
    weight_norm: float | None
    features: int
    dead: int


class _Adapter(NamedTuple):
    """D [K,r], U [N,r], s, and H if it is behind a relu."""

    down: Tensor
    up: Tensor
    scaling: float
    behind_relu: Tensor | None


class _Layer(NamedTuple):
    adapters: list[_Adapter]
    # Reads ‖W‖_F; None where W cannot be read.
    weight_norm: Callable[[], Tensor] | None


@torch.no_grad()
def measure_updates(
    model: nn.Module, weight_norms: MutableMapping[str, float | None] | None = None
) -> tuple[dict[str, Update], dict[str, str]]:
    """Measure the update of every adapted layer; one read of W per Neat layer, none per LoRA layer.

    ‖ΔW‖_F² = tr((UᵀU)·(DᵀD))

    Neither gradients nor the random numbers of training are touched.

    Args:
        model: a model with Neat layers, with fused LoRA layers, or with PEFT's PEANuT, NEAT or LoRA layers.
        weight_norms: ‖W‖_F by layer from an earlier call, which adds what is missing; W is read again without it.

    Returns:
        The updates by layer, and the adapted layers that are left out, each with the reason.
    """
    norms: MutableMapping[str, float | None] = {} if weight_norms is None else weight_norms
    squares: dict[str, Tensor] = {}
    dead: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    features: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        layer = _read(module)
        if isinstance(layer, str):
            left_out[name] = layer
        elif layer is not None:
            # Of one layer at a time there are factors; what is kept are numbers, fetched together in the end.
            squares[name], dead[name], features[name] = _square(layer.adapters), *_dead(layer.adapters)
            if name not in norms and layer.weight_norm is not None:
                read[name] = layer.weight_norm()
            norms.setdefault(name)
    norms.update(_values(read))
    square, count = _values(squares), _values(dead)
    return {n: Update(max(square[n], 0.0) ** 0.5, norms[n], features[n], int(count[n])) for n in squares}, left_out


def _values(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Numbers of scalars on any devices, with one wait for each device."""
    devices = {scalar.device for scalar in scalars.values()}
    found: dict[str, float] = {}
    for device in devices:
        here = {name: scalar for name, scalar in scalars.items() if scalar.device == device}
        found.update(zip(here, torch.stack(list(here.values())).tolist(), strict=True))
    return found


def _square(adapters: list[_Adapter]) -> Tensor:
    # The products of the Gram matrices cancel where D and U are badly conditioned, hence float64; MPS has none.
    wide = torch.float32 if adapters[0].down.device.type == "mps" else torch.float64
    down = torch.cat([a.down.to(wide) for a in adapters], dim=1)
    up = torch.cat([a.up.to(wide) * a.scaling for a in adapters], dim=1)
    return ((up.t() @ up) * (down.t() @ down)).sum()


def _dead(adapters: list[_Adapter]) -> tuple[Tensor, int]:
    """How many columns behind a relu are zero, and how many there are."""
    features = [a.behind_relu for a in adapters if a.behind_relu is not None]
    if not features:
        return adapters[0].down.new_zeros((), dtype=torch.int64), 0
    zero = torch.cat([(H == 0).all(dim=0) for H in features])
    return zero.sum(), zero.numel()


def _read(module: nn.Module) -> _Layer | str | None:
    """What there is to measure in a module; why it cannot be measured; None if it is no adapted layer."""
    if isinstance(module, (FusedNeatLinear, FusedLoraLinear)):
        return _own(module)
    # A layer of PEFT cannot be in a model of somebody who has not imported PEFT.
    if "peft.tuners.tuners_utils" in sys.modules and isinstance(
        module, sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    ):
        return _of_peft(module)
    return None


def _own(layer: FusedNeatLinear | FusedLoraLinear) -> _Layer | str:
    if not _are_whole(p for name, p in layer.named_parameters() if name != "bias"):
        return _SHARDED
    W = as_matrix(layer.base_weight, layer.transposed)
    if isinstance(layer, FusedLoraLinear):
        adapter = _Adapter(layer.lora_A.t(), layer.lora_B, layer.scaling, None)
    else:
        H = layer._features(W)
        down, up = arrange(layer.orientation, H, layer.neat_B)
        adapter = _Adapter(down, up, layer.scaling, H if layer.activation == "relu" else None)
    return _Layer([adapter], lambda: _norm(W))


def _are_whole(parameters: Iterable[Tensor]) -> bool:
    """Whether matrices are there: FSDP and ZeRO leave shards, or nothing, in their place."""
    return all(type(p.data) is Tensor and p.ndim == 2 and p.numel() > 0 and not p.is_meta for p in parameters)


def _norm(W: Tensor) -> Tensor:
    """‖W‖_F in row blocks, so that no fp32 copy of W is made."""
    blocks = W.split(max(1, _BLOCK // max(1, W.shape[1])))
    return torch.stack([torch.linalg.vector_norm(block.float()) for block in blocks]).norm()


def _of_peft(layer: Any) -> _Layer | str:
    if layer.merged:
        return "it is merged"
    from peft.tuners.lora.layer import LoraLayer

    from neat_kernels.integrations.peft.bases import packed_weight, plain_weight

    adapters = _lora(layer) if isinstance(layer, LoraLayer) else _networks(layer)
    if isinstance(adapters, str):
        return adapters
    if not adapters:
        return "no adapter of it is active"
    base = layer.get_base_layer()
    if (W := plain_weight(base)) is not None:
        return _Layer(adapters, lambda: _norm(W))
    if (packed := packed_weight(base)) is not None:
        return _Layer(adapters, lambda: torch.stack([_norm(block) for _, block in packed.blocks()]).norm())
    return _Layer(adapters, None)


def _lora(layer: Any) -> list[_Adapter] | str:
    adapters = []
    for name in layer.active_adapters:
        if name in layer.lora_embedding_A:
            return "LoRA of an embedding has no factors of a linear layer"
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", {}):
            return f"ΔW of {type(layer.lora_variant[name]).__name__} is not the product of its factors"
        A, B = layer.lora_A[name], layer.lora_B[name]
        if not isinstance(A, nn.Linear) or not isinstance(B, nn.Linear):
            return f"LoRA by {type(A).__name__} has no factors of a linear layer"
        if not _are_whole((A.weight, B.weight)):
            return _SHARDED
        adapters.append(_Adapter(A.weight.t(), B.weight, float(layer.scaling[name]), None))
    return adapters


def _networks(layer: Any) -> list[_Adapter] | str:
    from peft.tuners.peanut.layer import Linear as PeanutLinear

    from neat_kernels.integrations.peft.branches import Settings, route
    from neat_kernels.integrations.peft.neat import NeatLinear
    from neat_kernels.integrations.peft.peanut import FusedPeanutLinear

    kind: Any = NeatLinear if isinstance(layer, NeatLinear) else FusedPeanutLinear
    if not isinstance(layer, (NeatLinear, PeanutLinear)):
        return f"{type(layer).__name__} is no layer of PEANuT, NEAT or LoRA"
    names = [name for name in layer.active_adapters if name in kind._known_names(layer)]
    for name in names:
        if reason := kind._obstacle(layer, name):
            return reason
    way = route(layer, Settings())
    if isinstance(way, str):
        return way
    adapters = []
    for name in names:
        network = kind._network(layer, name)
        if not _are_whole(network.parameters):
            return _SHARDED
        H = way.features(network)
        down, up, scaling, _ = network.branch(H)
        adapters.append(_Adapter(down, up, scaling, H if network.activation == "relu" else None))
    return adapters
