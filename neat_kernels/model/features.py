"""What the kernels of the weight side read, write and compute: H = g(W·…), and its backward.

Operands have the names of the kernels' arguments, and every size comes from the function of kernels/launch.py that the
host code asks.
"""

from __future__ import annotations

from neat_kernels.kernels import launch
from neat_kernels.model.work import HALF, ITEMSIZE, Layer, Sum, Work, present, reduce

_F32 = 4


def precision_unit(target: launch.Target) -> str:
    """The unit that multiplies fp32 operands of the features and the branch."""
    return "tf32x3" if launch.branch_precision(target) == "tf32x3" else "fp32"


def feature_rows(layer: Layer) -> tuple[int, int]:
    """(rows of H, length of the reduction that makes it)."""
    N, K = layer.out_features, layer.in_features
    return (K, N) if layer.orientation == "out" else (N, K)


def _chain_elements(layer: Layer) -> int:
    return 2 * layer.depth * layer.r * layer.r


def chain(layer: Layer) -> int | None:
    """Bytes of the chain, None without one."""
    return _chain_elements(layer) * layer.adapter_itemsize if layer.depth else None


def _trace(layer: Layer, planes: int) -> int | None:
    return planes * feature_rows(layer)[0] * layer.r * _F32 if layer.depth else None


def stack(layer: Layer) -> tuple[Work, ...]:
    """Encoders and decoders become one tensor."""
    size = chain(layer)
    return () if size is None else (Work("torch.stack", {"layers": size}, {"chain": size}),)


def forward(layer: Layer, target: launch.Target) -> tuple[Work, ...]:
    """H and Z."""
    (rows, length), r, R = feature_rows(layer), layer.r, launch.block_r(layer.r)
    unit = layer.dtype if layer.adapter_dtype == layer.dtype and layer.dtype in HALF else precision_unit(target)
    # W as stored is [N,K]: in its transpose the rows are not contiguous.
    walk = launch.walk(rows, length, layer.orientation == "in", r, ITEMSIZE.get(unit, _F32), target)
    H = rows * r * _F32
    reads = {"w_ptr": layer.out_features * layer.in_features * layer.itemsize}
    reads["a_ptr"] = r * length * layer.adapter_itemsize
    product = 2 * rows * length * R
    if walk.pieces == 1:
        g_reads, g_writes, through_chain = _g(layer)
        whole = Work(
            "features._project_kernel", reads | g_reads, {"z_ptr": H} | g_writes, product + through_chain, unit
        )
        return (*stack(layer), whole)
    project = Work("features._project_kernel", reads, {"z_ptr": walk.pieces * H}, product, unit)
    return (*stack(layer), project, finish(layer, target, walk.pieces))


def _g(layer: Layer) -> tuple[dict[str, int], dict[str, int], int]:
    """What a kernel that applies g reads, writes and computes for it."""
    rows, r, R = feature_rows(layer)[0], layer.r, launch.block_r(layer.r)
    trace = _trace(layer, 2 * layer.depth)
    reads, writes = present(chain_ptr=chain(layer), trace_ptr=trace), present(h_ptr=rows * r * _F32, trace_ptr=trace)
    return reads, writes, 2 * layer.depth * 2 * rows * R * R


def finish(layer: Layer, target: launch.Target, pieces: int) -> Work:
    """H and Z from partial sums of Z."""
    g_reads, g_writes, through_chain = _g(layer)
    Z = feature_rows(layer)[0] * layer.r * _F32
    return Work(
        "features._chain_forward_kernel",
        {"partial_ptr": pieces * Z} | g_reads,
        {"z_ptr": Z} | g_writes,
        pieces * Z // _F32 + through_chain,
        precision_unit(target) if layer.depth else "fp32",
    )


def backward(layer: Layer, target: launch.Target, dH: int, left: Sum | None) -> tuple[Work, ...]:
    """dA and the gradient of the chain from so many bytes of dH, and a sum that the token side has left."""
    (length, rows), r, R = feature_rows(layer), layer.r, launch.block_r(layer.r)
    unit = precision_unit(target)
    # From here on W is [rows, length]: as stored for "out", transposed for "in".
    walk = launch.walk(rows, length, layer.orientation == "out", r, _F32, target)
    dZ = length * r * _F32
    works, shares = through_chain(layer, target, dH)
    dA = r * rows * layer.adapter_itemsize
    partial = dA if walk.pieces == 1 else walk.pieces * r * rows * _F32
    W = layer.out_features * layer.in_features * layer.itemsize
    weight = Work(
        "features_backward._weight_kernel",
        present(w_ptr=W, dh_ptr=dZ, z_ptr=None if layer.depth else dZ, shares_ptr=shares),
        present(da_ptr=partial, dchain_ptr=chain(layer)),
        2 * rows * length * R,
        unit,
    )
    return (*works, weight, *reduce(left, None if walk.pieces == 1 else Sum(partial, dA)))


def through_chain(layer: Layer, target: launch.Target, dH: int) -> tuple[tuple[Work, ...], int | None]:
    """dZ and the shares of dchain, and the bytes of these; nothing without a chain."""
    if not layer.depth:
        return (), None
    rows, r, R = feature_rows(layer)[0], layer.r, launch.block_r(layer.r)
    dZ, trace = rows * r * _F32, _trace(layer, 2 * layer.depth + 1)
    blocks = launch.cdiv(rows, launch.config("chain", target, r, _F32).block_m)
    shares = blocks * _chain_elements(layer) * _F32
    work = Work(
        "features_backward._chain_backward_kernel",
        present(dh_ptr=dH, z_ptr=dZ, chain_ptr=chain(layer), trace_ptr=trace),
        present(dz_ptr=dZ, dchain_ptr=shares, trace_ptr=trace),
        # Forward again, its products again for σ', dE and dh.
        2 * layer.depth * 4 * 2 * rows * R * R,
        precision_unit(target),
    )
    return (work,), shares
