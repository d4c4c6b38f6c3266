"""The calls behind the launch tables: for each, host code that launches the stage on inputs of a nominal layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neat_kernels.kernels import features, launch
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.configs import NARROW
from neat_kernels.kernels.down import down
from neat_kernels.kernels.down_backward import down_backward
from neat_kernels.kernels.features_backward import through_chain
from neat_kernels.kernels.gemm import gemm
from neat_kernels.kernels.merge import merge_with_flags
from neat_kernels.kernels.reduce import Parts
from neat_kernels.kernels.small_reads import Operands, read_once
from neat_kernels.kernels.small_tokens import down_partial, finish_tokens
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.kernels.up_finish import Partial, finish
from neat_kernels.tuning.candidates import stage_of
from neat_kernels.tuning.timing import Problem

HALF = torch.bfloat16
_DROPOUT = 0.1
# Tokens of a small batch.
_FEW = 16
# Smooth: σ' of another activation may jump where a rounding fell the other way.
_ACTIVATION = "silu"


class Sizes(NamedTuple):
    """A layer and its tokens."""

    tokens: int
    in_features: int
    out_features: int


NOMINAL = Sizes(8192, 4096, 4096)


class Inputs:
    """Draws the tensors of one call, for factors of rank r in the dtype of the branch.

    Args:
        sizes: M, K and N.
        r: rank.
        branch: dtype of D, U, S and dS.
        device: where the tensors are.
        generator: what they are drawn from.
        dropout: whether a seed goes with them.
        pitch: columns of x and dy that lie between their rows and belong to neither.
    """

    def __init__(
        self,
        sizes: Sizes,
        r: int,
        branch: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        dropout: bool,
        pitch: int,
    ) -> None:
        self.sizes, self.r, self.branch, self.device = sizes, r, branch, device
        self._generator, self._pitch = generator, pitch
        self.seed = torch.tensor([1], device=device) if dropout else None
        self.dropout = _DROPOUT if dropout else 0.0
        M, K, N = sizes
        self.x, self.dy = self._tall(M, K), self._tall(M, N)
        self.W = self.draw(N, K, dtype=HALF) / math.sqrt(K)
        self.bias = self.draw(N, dtype=HALF)
        self.D, self.U = self.draw(K, r) / math.sqrt(K), self.draw(N, r)
        self.S, self.dS = self.draw(M, r), self.draw(M, r)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A normal tensor, of the branch's dtype unless it is told another."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.branch)

    def _tall(self, rows: int, columns: int) -> Tensor:
        return self.draw(rows, columns + self._pitch, dtype=HALF)[:, :columns]


Call = Callable[[], Sequence[Tensor]]


def _gemm(t: Inputs) -> Call:
    """dgrad, and apply where there is no mask: apply has none."""

    def call() -> Sequence[Tensor]:
        dx = gemm(t.dy, t.W, t.dS, t.D, scaling=1.0, seed=t.seed, dropout=t.dropout)
        return (dx,) if t.seed is not None else (dx, gemm(t.x, t.W.t(), t.S, t.U, t.bias, scaling=1.0))

    return call


def _down(t: Inputs) -> Call:
    """Without a product for the fused plan, with it for the one of cuBLAS."""

    def call() -> Sequence[Tensor]:
        alone, _ = down(t.x, t.D, t.seed, t.dropout, t.branch)
        S, C = down(t.x, t.D, t.seed, t.dropout, t.branch, Product(t.U, t.bias, 1.0, HALF))
        assert C is not None
        return alone, S, C

    return call


def _rows(t: Inputs) -> Call:
    _, K, _ = t.sizes
    A, dH, Z = t.draw(t.r, K), t.draw(K, t.r, dtype=torch.float32), t.draw(K, t.r, dtype=torch.float32)

    def call() -> Sequence[Tensor]:
        H, projected = features.forward(t.W, A, None, "in", _ACTIVATION)
        if t.branch == HALF:
            return H, projected
        return H, projected, features.backward(dH, t.W, Z, None, "out", _ACTIVATION, torch.float32, False)[0]

    return call


def _columns(t: Inputs) -> Call:
    _, _, N = t.sizes
    A, dH, Z = t.draw(t.r, N), t.draw(N, t.r, dtype=torch.float32), t.draw(N, t.r, dtype=torch.float32)

    def call() -> Sequence[Tensor]:
        dD = down_backward(t.x, t.dS, t.seed, t.dropout, torch.float32)
        if t.seed is not None:
            return (dD,)
        H, projected = features.forward(t.W, A, None, "out", _ACTIVATION)
        if t.branch == HALF:
            return dD, H, projected
        return dD, H, projected, features.backward(dH, t.W, Z, None, "in", _ACTIVATION, torch.float32, False)[0]

    return call


def _up_backward(t: Inputs) -> Call:
    def call() -> Sequence[Tensor]:
        dS, dU, dbias, _ = up_backward(t.dy, t.U, t.S, 1.0, t.branch, torch.float32, torch.float32)
        return [one for one in (dS, dU, dbias) if one is not None]

    return call


def _finish(t: Inputs) -> Call:
    M, _, N = t.sizes
    config = launch.config("up_backward", t.device, t.r, t.branch.itemsize)
    blocks = launch.cdiv(N, config.block_n)
    pieces, _ = launch.split(blocks, M, config.block_m, t.device, launch.up_backward_fill(t.device))
    shapes = ((blocks, M, t.r), (pieces, N, t.r), (pieces, N))
    partial = Partial(*(t.draw(*shape, dtype=torch.float32) for shape in shapes))
    dtypes = (t.branch, torch.float32, torch.float32)

    def call() -> Sequence[Tensor]:
        product = Product(t.D, None, 1.0, HALF, t.seed, t.dropout)
        alone = finish(partial, M, N, t.r, 1.0, dtypes, t.device, None)
        return [one for one in (*alone, *finish(partial, M, N, t.r, 1.0, dtypes, t.device, product)) if one is not None]

    return call


def _stacked(t: Inputs) -> Call:
    """As many tokens as the tile holds, which are more than the rank; both ways."""
    return _read_once(t, min(t.sizes.tokens, t.r), min(t.r, _FEW), crossed=False)


def _crossed(t: Inputs) -> Call:
    """Few tokens, and a rank that the tile holds; both ways."""
    return _read_once(t, min(t.sizes.tokens, _FEW), t.r, crossed=True)


def _read_once(t: Inputs, tokens: int, r: int, crossed: bool) -> Call:
    _, K, N = t.sizes
    factors = {rows: t.draw(rows, r) / math.sqrt(rows) for rows in (K, N)}

    def call() -> Sequence[Tensor]:
        results: list[Tensor] = []
        for V, T in ((t.W, t.x[:tokens]), (t.W.t(), t.dy[:tokens])):
            F = factors[V.shape[0 if crossed else 1]]
            results += read_once(Operands(V, T, F, None, None, t.branch, crossed), transposed=False)
        # Another tile makes other partial sums.
        return [partial.sum(0) for partial in results]

    return call


def _small_down(t: Inputs) -> Call:
    x = t.x[:_FEW]
    seed = torch.tensor([1], device=t.device)

    def call() -> Sequence[Tensor]:
        shares = down_partial(x, t.D, None, 0.0, t.branch), down_partial(x, t.D, seed, _DROPOUT, t.branch)
        # Another tile makes other shares.
        return [share.sum(0) for share in shares]

    return call


def _small_finish(t: Inputs) -> Call:
    M, _, N = t.sizes
    P, S = t.draw(8, min(M, _FEW), N, dtype=torch.float32), t.S[:_FEW]
    shares = t.draw(8, *S.shape, dtype=torch.float32)

    def call() -> Sequence[Tensor]:
        made = torch.empty_like(S)
        y = finish_tokens(P, made, shares, t.U, t.bias, 1.0, HALF)
        return y, made, finish_tokens(P, S, None, t.U, None, 1.0, HALF)

    return call


def _merge(t: Inputs) -> Call:
    D, U = (t.draw(rows, t.r, dtype=torch.float32) for rows in t.sizes[1:])

    def call() -> Sequence[Tensor]:
        return merge_with_flags(t.W, D, U, 1.0 / t.sizes.in_features, None)[:1]

    return call


def _chain(t: Inputs) -> Call:
    """From dH in partial sums and from dH itself."""
    _, _, N = t.sizes
    dH, Z = (t.draw(N, t.r, dtype=torch.float32) for _ in range(2))
    chain = t.draw(2, t.r, t.r, dtype=torch.float32) / math.sqrt(t.r)
    parts = Parts(t.draw(8, N, t.r, dtype=torch.float32), 1.0)

    def call() -> Sequence[Tensor]:
        dZ, _ = through_chain(parts, Z, chain, _ACTIVATION, True)
        return dZ, *features.backward(dH, None, Z, chain, "in", _ACTIVATION, None, True)

    return call


_CALLS: dict[str, Callable[[Inputs], Call]] = {
    "gemm": _gemm,
    "gemm descriptor": _gemm,
    "rows": _rows,
    "down": _down,
    "columns": _columns,
    "up_backward": _up_backward,
    "finish": _finish,
    "stacked": _stacked,
    "crossed": _crossed,
    "small_down": _small_down,
    "small_finish": _small_finish,
    "merge": _merge,
    "chain": _chain,
}


def build(table: str, r: int, sizes: Sizes, device: torch.device) -> Problem:
    """The problem whose launches take their configuration from `table`, with seeded inputs.

    Its sizes are changed where a table is for narrow matrices, or for others.
    """
    if "narrow" in table:
        sizes = Sizes(sizes.tokens, min(sizes.in_features, NARROW), min(sizes.out_features, NARROW))
    elif table == "gemm descriptor":
        sizes = Sizes(sizes.tokens, max(sizes.in_features, NARROW + 8), max(sizes.out_features, NARROW + 8))
    generator = torch.Generator(device).manual_seed(0)
    branch = torch.float32 if table.endswith(" fp32") else HALF
    # A row that is not 16-byte aligned keeps a GEMM on pointers where the device has descriptors.
    pitch = 1 if stage_of(table) == "gemm" and launch.has_descriptors(device) else 0
    copies = copies_of(sizes, device)
    calls = [
        _CALLS[stage_of(table)](Inputs(sizes, r, branch, device, generator, "dropout" in table, pitch))
        for _ in range(copies)
    ]

    def call(i: int) -> Sequence[Tensor]:
        with launch.on(device):
            return calls[i]()

    return Problem(call, copies, max(sizes), device)


def copies_of(sizes: Sizes, device: torch.device) -> int:
    """How many layers to rotate through so that even the weights alone are twice what the device's caches hold."""
    if device.type == "cpu":
        return 1
    from neat_kernels.model.devices import reported_as

    properties = torch.cuda.get_device_properties(device)
    known = reported_as(properties.name)
    cache = max(properties.L2_cache_size, 0 if known is None else known.cache)
    _, K, N = sizes
    return max(2, math.ceil(2 * cache / (K * N * HALF.itemsize)))
