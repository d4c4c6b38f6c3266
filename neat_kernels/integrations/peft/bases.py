"""What a base layer is to a layer on top of it: a W to multiply with, or one that only it can multiply.

Plain: nn.Linear or Conv1D whose call is F.linear alone; x·Wᵀ and the branch are one operator.
Called: the same W, but something hangs on the call (hooks, a wrapper); the base runs, and the branch is added.
Packed: a quantised W, which the base multiplies; its features read W in dequantised row blocks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_every_module

from neat_kernels.base_layer import as_matrix, is_conv1d
from neat_kernels.vocabulary import is_sharded

# Bytes of W that are alive in fp32 at one time: a quarter of the largest W of an 8B model, 14336 x 4096.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Packed:
    """A quantised W [N,K] that is read in dequantised row blocks of at most 64 MiB.

    Args:
        kind: library and format.
        shape: N, K.
        device: where W is.
        rows: the dequantised rows of a slice, [n, K].
        step: rows of a slice must be a multiple of this, but for the last.
        whole: W dequantises only as a whole, so that one layer's W is alive for a moment.
    """

    kind: str
    shape: tuple[int, int]
    device: torch.device
    rows: Callable[[slice], Tensor]
    step: int = 1
    whole: bool = False

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of N and the dequantised rows of each."""
        N, K = self.shape
        fits = N if self.whole else max(self.step, BLOCK_BYTES // (4 * K) // self.step * self.step)
        for start in range(0, N, fits):
            rows = slice(start, min(start + fits, N))
            yield rows, self.rows(rows)


def plain_weight(base: nn.Module) -> Tensor | None:
    """W [N,K] if `base` is a layer of this kind with a frozen floating W that holds data, else None."""
    conv1d = is_conv1d(base)
    if not conv1d and type(base).forward is not nn.Linear.forward:
        return None
    weight = base.weight
    if not isinstance(weight, Tensor) or (type(weight) is not nn.Parameter and type(weight) is not Tensor):
        return None
    if weight.requires_grad or not weight.is_floating_point() or weight.element_size() < 2:
        return None
    return None if weight.is_meta or weight.ndim != 2 else as_matrix(weight, conv1d)


def matrix_shape(base: Any) -> tuple[int, int]:
    """N, K of a linear layer of any kind."""
    if is_conv1d(base):
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features


def is_only_called(base: nn.Module) -> bool:
    """Whether something hangs on the call of `base`, so that it must be called."""
    return "forward" in vars(base) or _has_hooks(base)


def is_hooked_part(part: nn.Module) -> bool:
    """Whether something hangs on the call of a part of an adapter that matters where the part is not called.

    What accelerate puts on every module of a model that it spreads over devices only moves inputs, unless it offloads.
    """
    moves = "forward" in vars(part) and type(part.__dict__.get("_hf_hook")).__name__ == "AlignDevicesHook"
    return _has_hooks(part) or ("forward" in vars(part) and not (moves and not part._hf_hook.offload))  # type: ignore[union-attr]


def _has_hooks(base: nn.Module) -> bool:
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or hooks_of_every_module._global_forward_hooks
        or hooks_of_every_module._global_forward_pre_hooks
        or hooks_of_every_module._global_backward_hooks
        or hooks_of_every_module._global_backward_pre_hooks
    )


def packed_weight(base: nn.Module) -> Packed | None:
    """The quantised W of `base`, or None if it is of no known kind."""
    # A base cannot be of a library that nobody has imported.
    for library, reader in _READERS.items():
        if library in sys.modules and (packed := reader(base, sys.modules[library])) is not None:
            return packed
    return None


def _bitsandbytes(base: Any, bnb: Any) -> Packed | None:
    if isinstance(base, bnb.nn.Linear4bit):
        return _bitsandbytes_4bit(base, bnb)
    if isinstance(base, bnb.nn.Linear8bitLt) and base.weight.dtype == torch.int8:
        codes = base.weight.data
        scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB

        def rows(part: slice) -> Tensor:
            return codes[part].float() * (scales[part].float() / 127.0).unsqueeze(1)

        return Packed("bitsandbytes int8", tuple(codes.shape), codes.device, rows)
    return None


def _bitsandbytes_4bit(base: Any, bnb: Any) -> Packed | None:
    # The weight has lost it where FSDP has made another parameter of it.
    state, codes = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None), base.weight.data
    if state is None or is_sharded(base.weight):
        return None
    packed_for_cpu = bool(getattr(state, "packing_format_for_cpu", False))
    if packed_for_cpu:
        codes, state = bnb.functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    (N, K), size = state.shape, state.blocksize
    codes, absmax = codes.view(torch.uint8).reshape(-1), state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    absmax = absmax.float()
    # A slice begins with a block of the quantisation.
    step = next(n for n in range(1, size + 1) if n * K % size == 0)

    def rows(part: slice) -> Tensor:
        first, last = part.start * K, part.stop * K
        of_part = bnb.functional.QuantState(
            absmax=absmax[first // size : -(-last // size)],
            shape=torch.Size((part.stop - part.start, K)),
            dtype=torch.float32,
            blocksize=size,
            quant_type=state.quant_type,
            code=state.code,
        )
        return bnb.functional.dequantize_4bit(codes[first // 2 : -(-last // 2)].unsqueeze(1), of_part)

    return Packed(f"bitsandbytes {state.quant_type}", (N, K), codes.device, rows, step, packed_for_cpu)


def _torchao(base: Any, torchao: Any) -> Packed | None:
    weight: Any = getattr(base, "weight", None)
    if not type(weight).__module__.startswith("torchao.") or not hasattr(weight, "dequantize"):
        return None
    kind = f"torchao {type(weight).__name__}"
    shape = weight.shape[0], weight.shape[1]
    try:
        weight[0:1].dequantize()
    except (NotImplementedError, RuntimeError, AttributeError):
        return Packed(kind, shape, weight.device, lambda part: weight.dequantize(), whole=True)
    return Packed(kind, shape, weight.device, lambda part: weight[part].dequantize())


def _hqq(base: Any, hqq: Any) -> Packed | None:
    if not isinstance(base, hqq.core.quantize.HQQLinear) or not base.ready:
        return None
    shape = base.out_features, base.in_features
    return Packed("HQQ", shape, base.W_q.device, lambda part: base.dequantize(), whole=True)


_READERS: dict[str, Callable[[Any, Any], Packed | None]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "hqq": _hqq,
}
