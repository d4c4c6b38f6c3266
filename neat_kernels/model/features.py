"""What the kernels of the weight side read, write and compute: H = g(W·…), and its backward.

Operands have the names of the kernels' arguments, and every size comes from the function of kernels/launch.py that the
host code asks.
"""

from __future__ import annotations

from neat_kernels.kernels import launch
from neat_kernels.model.work import HALF, ITEMSIZE, Layer, Work, present

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


def _chain(layer: Layer) -> int | None:
    return _chain_elements(layer) * layer.adapter_itemsize if layer.depth else None


def _trace(layer: Layer, planes: int) -> int | None:
    return planes * feature_rows(layer)[0] * layer.r * _F32 if layer.depth else None


def _stack(layer: Layer) -> tuple[Work, ...]:
    """Encoders and decoders become one tensor."""
    chain = _chain(layer)
    return () if chain is None else (Work("torch.stack", {"layers": chain}, {"chain": chain}),)


def forward(layer: Layer, target: launch.Target) -> tuple[Work, ...]:
    """H and Z."""
    (rows, length), r, R = feature_rows(layer), layer.r, launch.block_r(layer.r)
    unit = layer.dtype if layer.adapter_dtype == layer.dtype and layer.dtype in HALF else precision_unit(target)
    # W as stored is [N,K]: in its transpose the rows are not contiguous.
    walk = launch.walk(rows, length, layer.orientation == "in", r, ITEMSIZE.get(unit, _F32), target)
    H = rows * r * _F32
    through_chain = 2 * layer.depth * 2 * rows * R * R
    # What applies g: the kernel itself, or the one that adds its partial sums.
    g_reads = present(chain_ptr=_chain(layer), trace_ptr=_trace(layer, 2 * layer.depth))
    g_writes = present(h_ptr=H, trace_ptr=_trace(layer, 2 * layer.depth))
    reads = {"w_ptr": layer.out_features * layer.in_features * layer.itemsize}
    reads["a_ptr"] = r * length * layer.adapter_itemsize
    product = 2 * rows * length * R
    if walk.pieces == 1:
        whole = Work(
            "features._project_kernel", reads | g_reads, {"z_ptr": H} | g_writes, product + through_chain, unit
        )
        return (*_stack(layer), whole)
    partial = walk.pieces * H
    return (
        *_stack(layer),
        Work("features._project_kernel", reads, {"z_ptr": partial}, product, unit),
        Work(
            "features._finish_kernel",
            {"partial_ptr": partial} | g_reads,
            {"z_ptr": H} | g_writes,
            walk.pieces * rows * r + through_chain,
            precision_unit(target) if layer.depth else "fp32",
        ),
    )


def backward(layer: Layer, target: launch.Target) -> tuple[Work, ...]:
    """dA and the gradient of the chain, from dH."""
    (length, rows), r, R = feature_rows(layer), layer.r, launch.block_r(layer.r)
    unit = precision_unit(target)
    # From here on W is [rows, length]: as stored for "out", transposed for "in".
    walk = launch.walk(rows, length, layer.orientation == "out", r, _F32, target)
    dZ = length * r * _F32
    works = []
    shares = dchain = None
    if layer.depth:
        blocks = launch.cdiv(length, launch.config("chain", target, r, _F32).block_m)
        shares, dchain = blocks * _chain_elements(layer) * _F32, _chain(layer)
        trace = _trace(layer, 2 * layer.depth + 1)
        works.append(
            Work(
                "features_backward._chain_backward_kernel",
                present(dh_ptr=dZ, z_ptr=dZ, chain_ptr=_chain(layer), trace_ptr=trace),
                present(dz_ptr=dZ, dchain_ptr=shares, trace_ptr=trace),
                # Forward again, its products again for σ', dE and dh.
                2 * layer.depth * 4 * 2 * length * R * R,
                unit,
            )
        )
    dA = r * rows * layer.adapter_itemsize
    partial = dA if walk.pieces == 1 else walk.pieces * r * rows * _F32
    W = layer.out_features * layer.in_features * layer.itemsize
    works.append(
        Work(
            "features_backward._weight_kernel",
            present(w_ptr=W, dh_ptr=dZ, z_ptr=None if layer.depth else dZ, shares_ptr=shares),
            present(da_ptr=partial, dchain_ptr=dchain),
            2 * rows * length * R,
            unit,
        )
    )
    if walk.pieces > 1:
        works.append(
            Work("reduce._reduce_kernel", {"partial_ptr": partial}, {"out_ptr": dA}, walk.pieces * r * rows, "fp32")
        )
    return tuple(works)
