"""What the kernels of the token side read, write and compute, in the two plans of the base GEMM.

S = x·D          y = x·Wᵀ + bias + s·S·Uᵀ
dS = s·dy·U      dU = s·dyᵀ·S      dx = dy·W + dS·Dᵀ      dD = xᵀ·dS

Operands have the names of the kernels' arguments. Dropout changes operations and tiles, and no bytes: it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from neat_kernels.kernels import launch
from neat_kernels.kernels.branch import columns
from neat_kernels.kernels.configs import Config
from neat_kernels.model.features import precision_unit
from neat_kernels.model.gemm import triton_efficiency
from neat_kernels.model.work import HALF, Layer, Sum, Work, present, reduce

_F32 = 4
# The kernel of the fused plan and how it calls A, B and C, by how it loads them.
_GEMMS = {
    "pointers": ("gemm._gemm_kernel", "ptr"),
    "descriptors": ("gemm_descriptor._gemm_descriptor_kernel", "desc"),
}


@dataclass(frozen=True)
class Tokens:
    """The token side of a layer on a device.

    Args:
        layer: the layer.
        target: what the launches are configured for.
        cached: whether D and U are those that inference caches, in the branch dtype; else they are H and B.
    """

    layer: Layer
    target: launch.Target
    cached: bool = False

    @property
    def unit(self) -> str:
        """What multiplies in the branch."""
        return self.layer.dtype if self.layer.dtype in HALF else precision_unit(self.target)

    @property
    def loads(self) -> str:
        """How the fused GEMM loads x, dy and W: descriptors ask for rows of a multiple of 16 bytes."""
        rows = (self.layer.in_features, self.layer.out_features)
        aligned = all(length * self.layer.itemsize % 16 == 0 for length in rows)
        return "descriptors" if aligned and launch.has_descriptors(self.target) else "pointers"

    def factor(self, side: str) -> int:
        """Bytes of D or U: one of them is H in fp32, the other B."""
        layer = self.layer
        is_H = (side == "D") == (layer.orientation == "out")
        itemsize = layer.itemsize if self.cached else _F32 if is_H else layer.adapter_itemsize
        return (layer.in_features if side == "D" else layer.out_features) * layer.r * itemsize

    def matrix(self, rows: int, columns: int) -> int:
        """Bytes of x, y or W."""
        return rows * columns * self.layer.itemsize

    @property
    def bias(self) -> int | None:
        """Bytes of the bias, None without one."""
        return self.layer.out_features * self.layer.itemsize if self.layer.bias else None

    def config(self, stage: str) -> Config:
        """The configuration of a stage of the branch."""
        return launch.config(stage, self.target, self.layer.r, self.layer.itemsize)


def forward(side: Tokens, plan: str) -> tuple[Work, ...]:
    """down and apply."""
    layer = side.layer
    M, N, K, r, R = layer.tokens, layer.out_features, layer.in_features, layer.r, launch.block_r(layer.r)
    x, W, y, S = side.matrix(M, K), side.matrix(N, K), side.matrix(M, N), M * r * layer.itemsize
    reads, pieces = {"x_ptr": x, "d_ptr": side.factor("D")}, 1
    if plan == "fused":
        down = Work("down._down_kernel", reads, {"s_ptr": S}, 2 * M * K * R, side.unit)
        apply = _gemm(side, (M, N, K), {"q_ptr": side.factor("U")} | present(bias_ptr=side.bias))
        return down, apply
    config = side.config("down")
    pieces, _ = columns(launch.cdiv(M, config.block_m), N, config.block_n, side.target)
    reads |= present(u_ptr=side.factor("U"), bias_ptr=side.bias)
    flops = 2 * M * K * R * pieces + 2 * M * N * R
    return (
        Work("down._down_kernel", reads, {"s_ptr": pieces * S, "c_ptr": y}, flops, side.unit),
        accumulating(layer, (M, N, K), {"y": y, "x": x, "W": W}),
    )


def _gemm(side: Tokens, sizes: tuple[int, int, int], more: dict[str, int]) -> Work:
    """C [M,N] = A [M,K]·B [K,N] + P·Qᵀ in the Triton GEMM."""
    (M, N, K), layer = sizes, side.layer
    flops = 2 * M * N * (K + launch.block_r(layer.r))
    efficiency = triton_efficiency(side.target.arch, K, side.loads).value
    name, operand = _GEMMS[side.loads]
    reads = {f"a_{operand}": side.matrix(M, K), f"b_{operand}": side.matrix(K, N)}
    reads |= {"p_ptr": M * layer.r * layer.itemsize} | more
    return Work(name, reads, {f"c_{operand}": side.matrix(M, N)}, flops, layer.dtype, efficiency)


def accumulating(layer: Layer, sizes: tuple[int, int, int], reads: dict[str, int]) -> Work:
    """The vendor's GEMM onto the first operand of `reads`."""
    M, N, K = sizes
    return Work("torch.addmm_", reads, {next(iter(reads)): M * N * layer.itemsize}, 2 * M * N * K, layer.dtype)


def up_backward(side: Tokens, plan: str) -> tuple[Work, ...]:
    """dS and dU in partial sums and their sums; in plan cublas the product of dS too."""
    layer = side.layer
    M, N, K, r, R = layer.tokens, layer.out_features, layer.in_features, layer.r, launch.block_r(layer.r)
    config = side.config("up_backward")
    blocks = launch.cdiv(N, config.block_n)
    pieces, _ = launch.split(blocks, M, config.block_m, side.target, launch.up_backward_fill(side.target))
    S, dS, dU = M * r * layer.itemsize, blocks * M * r * _F32, pieces * N * r * _F32
    partial = Work(
        "up_backward._up_backward_kernel",
        {"dy_ptr": side.matrix(M, N), "u_ptr": side.factor("U"), "s_ptr": S},
        {"ds_ptr": dS, "du_ptr": dU},
        4 * M * N * R,
        side.unit,
    )
    reads = {"ds_partial_ptr": dS, "du_partial_ptr": dU}
    writes, flops, copies = {"du_ptr": side.factor("U")}, blocks * M * r + pieces * N * r, 1
    if plan == "cublas":
        config = side.config("finish")
        copies, _ = columns(launch.cdiv(M, config.block_m), K, config.block_n, side.target)
        reads["d_ptr"], writes["c_ptr"] = side.factor("D"), side.matrix(M, K)
        flops = copies * blocks * M * r + pieces * N * r + 2 * M * K * R
    writes["ds_ptr"] = copies * S
    return partial, Work("up_finish._finish_kernel", reads, writes, flops, side.unit)


def dgrad(side: Tokens, plan: str) -> Work:
    """dx."""
    layer = side.layer
    M, N, K = layer.tokens, layer.out_features, layer.in_features
    if plan == "fused":
        return _gemm(side, (M, K, N), {"q_ptr": side.factor("D")})
    operands = {"dx": side.matrix(M, K), "dy": side.matrix(M, N), "W": side.matrix(N, K)}
    return accumulating(layer, (M, K, N), operands)


def down_backward(side: Tokens) -> tuple[tuple[Work, ...], int, Sum | None]:
    """dD in partial sums, and for the features the bytes of dH and a sum that is left to them.

    A kernel of the chain adds the partial sums of dH; a single one in fp32 is the sum.
    """
    layer = side.layer
    M, K, r, R = layer.tokens, layer.in_features, layer.r, launch.block_r(layer.r)
    config = side.config("columns")
    pieces, _ = launch.split(launch.cdiv(K, config.block_m), M, config.block_k, side.target)
    partial, dD = pieces * K * r * _F32, side.factor("D")
    reads = {"x_ptr": side.matrix(M, K), "ds_ptr": M * r * layer.itemsize}
    work = Work("down_backward._down_backward_kernel", reads, {"partial_ptr": partial}, 2 * M * K * R, side.unit)
    left = None if partial == dD else Sum(partial, dD)
    if layer.orientation == "in":
        return (work,), side.factor("U"), left
    return ((work,), partial, None) if layer.depth else ((work, *reduce(left)), dD, None)
