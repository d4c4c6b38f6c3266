"""What the kernels of a small batch read, write and compute: one read of W each way, and what goes with it.

forward: x·Wᵀ and Z, then H, S and y        backward: dS and dU, dD, then dy·W and dA, then dx

Operands have the names of the kernels' arguments.
"""

from __future__ import annotations

from neat_kernels.kernels import launch
from neat_kernels.model import features, tokens
from neat_kernels.model.features import feature_rows, precision_unit
from neat_kernels.model.tokens import Tokens
from neat_kernels.model.work import ITEMSIZE, Sum, Work, present, reduce

_F32 = 4
# Operations in half precision that take as long as one in another unit: TF32 has half of the rate, and is done three
# times; an MI300X's fp32 an eighth.
_AS_HALF = {"bf16": 1, "fp16": 1, "tf32x3": 6, "fp32": 8}


def forward(side: Tokens) -> tuple[Work, ...]:
    """The read of W, H, the shares of S, y."""
    layer, r = side.layer, side.layer.r
    alike = layer.adapter_dtype == layer.dtype
    unit = layer.dtype if alike else precision_unit(side.target)
    _, length = feature_rows(layer)
    narrow = {"f_ptr": r * length * layer.adapter_itemsize}
    read, P, pieces = _read(side, False, narrow, unit)
    finish = features.finish(layer, side.target, pieces)
    config = side.config("small_down")
    shares, _ = launch.split(launch.cdiv(layer.tokens, config.block_m), layer.in_features, config.block_k, side.target)
    S = shares * layer.tokens * r * _F32
    down = Work(
        "small_tokens._down_partial_kernel",
        {"x_ptr": side.matrix(layer.tokens, layer.in_features), "d_ptr": side.factor("D")},
        {"s_ptr": S},
        2 * launch.block_r(r) * layer.tokens * layer.in_features,
        side.unit,
    )
    y = _finish(side, P, layer.out_features, present(shares_ptr=S, q_ptr=side.factor("U"), bias_ptr=side.bias), True)
    return (*features.stack(layer), read, finish, down, y)


def backward(side: Tokens) -> tuple[Work, ...]:
    """up backward, down backward, the chain's, the read of W, the sum of dA, dx."""
    layer = side.layer
    down, dH, left = tokens.down_backward(side)
    through_chain, shares = features.through_chain(layer, side.target, dH)
    rows, _ = feature_rows(layer)
    dZ = rows * layer.r * _F32
    narrow = present(f_ptr=dZ, z_ptr=None if layer.depth else dZ)
    read, P, pieces = _read(side, True, narrow, precision_unit(side.target))
    dA = read.writes["q_ptr"]
    of_dA = Sum(dA, dA // pieces // _F32 * layer.adapter_itemsize)
    dchain = features.chain(layer)
    of_dchain = None if shares is None or dchain is None else Sum(shares, dchain)
    dx = _finish(side, P, layer.in_features, {"q_ptr": side.factor("D")}, False)
    up = tokens.up_backward(side, "fused")
    return (*up, *down, *through_chain, read, *reduce(left, of_dA, of_dchain), dx)


def _read(side: Tokens, transposed: bool, narrow: dict[str, int], unit: str) -> tuple[Work, int, int]:
    """The read of W or Wᵀ, bytes of the partial sums of the token product, and pieces of the narrow one."""
    layer, r, M = side.layer, side.layer.r, side.layer.tokens
    shape = (layer.out_features, layer.in_features)
    rows, length = reversed(shape) if transposed else shape
    crossed, itemsize = layer.orientation == "out", ITEMSIZE.get(unit, _F32)
    shared = launch.shared_read(rows, length, M, r, itemsize, crossed, side.target)
    P, Q = shared.of_tokens * M * rows * _F32, shared.pieces * shared.owned * r * _F32
    name = "small_reads._crossed_kernel" if crossed else "small_reads._stacked_kernel"
    reads = {"v_ptr": side.matrix(rows, length), "t_ptr": side.matrix(M, length)} | narrow
    flops = 2 * rows * length * (launch.block_r(M) + _AS_HALF[unit] * launch.block_r(r))
    return Work(name, reads, {"p_ptr": P, "q_ptr": Q}, flops, layer.dtype), P, shared.pieces


def _finish(side: Tokens, P: int, columns: int, more: dict[str, int], makes_S: bool) -> Work:
    """y or dx from the partial sums of its base product, and S from its shares or as it is."""
    layer, M, r = side.layer, side.layer.tokens, side.layer.r
    S = M * r * layer.itemsize
    reads = {"partial_ptr": P} | more | ({} if makes_S else {"s_ptr": S})
    writes = {"c_ptr": side.matrix(M, columns)} | ({"s_ptr": S} if makes_S else {})
    flops = P // _F32 + 2 * M * columns * launch.block_r(r)
    return Work("small_tokens._finish_tokens_kernel", reads, writes, flops, side.unit)
