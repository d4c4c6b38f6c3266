"""Every kernel of the package, through its host code, and what each launch of it was meant to be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.gate.case import Case
from benchmarks.gate.fake_driver import Launch
from benchmarks.gate.rules import Expectations
from neat_kernels.kernels import features, small_batch
from neat_kernels.kernels.apply import apply
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.configs import NARROW
from neat_kernels.kernels.dgrad import dgrad
from neat_kernels.kernels.down import down
from neat_kernels.kernels.down_backward import down_backward
from neat_kernels.kernels.features_backward import through_chain
from neat_kernels.kernels.merge import merge
from neat_kernels.kernels.reduce import Parts
from neat_kernels.kernels.small_tokens import down_partial, finish_tokens
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.plan import most_of_a_small_batch
from neat_kernels.torch_backend.low_rank import Branch

_M, _N, _K = 2048, 4096, 4096
_RANKS = {"bf16": (4, 16, 32, 64, 128), "fp16": (16, 128), "fp32": (16, 32, 64, 128)}
_QUICK_RANK = 16
_SMALL_RANKS = (16, 32, 64)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cases() -> Iterator[Case]:
    """Every configuration: all ranks and variants in bf16, every width of the rank's tile in fp32, its ends in fp16."""
    for name, dtype in _DTYPES.items():
        for r in _RANKS[name]:
            quick = name == "bf16" and r == _QUICK_RANK
            token, features = functools.partial(_token, dtype, r), functools.partial(_features, dtype, r)
            yield Case(f"token {name} r={r}", token, quick)
            yield Case(f"features {name} r={r}", features, quick)
            yield Case(f"merge {name} r={r}", functools.partial(_merge, dtype, r), quick)
            if name == "fp16":
                continue
            yield Case(f"token dropout {name} r={r}", functools.partial(token, dropout=0.1))
            if name == "fp32":
                continue
            yield Case(f"merge stochastic {name} r={r}", functools.partial(_merge, dtype, r, stochastic=True), quick)
            wide = functools.partial(token, compute_dtype=torch.float32)
            yield Case(f"token fp32 branch {name} r={r}", wide)
            yield Case(f"token dropout fp32 branch {name} r={r}", functools.partial(wide, dropout=0.1))
            yield Case(f"features in {name} r={r}", functools.partial(features, orientation="in"))
            yield Case(f"features all {name} r={r}", functools.partial(features, adapter_dtype=dtype))
            yield Case(f"features depth 1 {name} r={r}", functools.partial(features, depth=1))
            yield Case(f"features depth 2 {name} r={r}", functools.partial(features, depth=2))
            yield Case(f"features in depth 2 {name} r={r}", functools.partial(features, orientation="in", depth=2))
            yield Case(f"features frozen chain {name} r={r}", functools.partial(_frozen_chain, dtype, r))
    yield from _small_cases()


def _small_cases() -> Iterator[Case]:
    """Every width of the tiles of tokens and of the rank, in the half types that have a small batch on a GPU."""
    for name, ranks in (("bf16", _SMALL_RANKS), ("fp16", _SMALL_RANKS[:1])):
        for r in ranks:
            quick = name == "bf16" and r == _QUICK_RANK
            small, beside = (functools.partial(case, _DTYPES[name], r) for case in (_small, _small_tokens))
            yield Case(f"small batch {name} r={r}", small, quick)
            if name == "fp16":
                continue
            yield Case(f"small batch all {name} r={r}", functools.partial(small, adapter_dtype=_DTYPES[name]))
            yield Case(f"small batch dropout {name} r={r}", functools.partial(beside, dropout=0.1))
            wide = functools.partial(beside, compute_dtype=torch.float32)
            yield Case(f"small batch fp32 branch {name} r={r}", wide)
            yield Case(f"small batch dropout fp32 branch {name} r={r}", functools.partial(wide, dropout=0.1))


def _token(dtype: torch.dtype, r: int, dropout: float = 0.0, compute_dtype: torch.dtype | None = None) -> None:
    """Both plans of apply and dgrad; the cuBLAS plan up to its products, since on a CPU the GEMM would run."""
    c = compute_dtype or dtype
    x, dy = torch.empty(_M, _K, dtype=dtype), torch.empty(_M, _N, dtype=dtype)
    W, bias = torch.empty(_N, _K, dtype=dtype), torch.empty(_N, dtype=dtype)
    D, U = torch.empty(_K, r), torch.empty(_N, r)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    for product in (Product(U, bias, 0.5, dtype), None):
        S, _ = down(x, D, seed, dropout, c, product)
    for product in (Product(D, None, 1.0, dtype, seed, dropout), None):
        dS, *_ = up_backward(dy, U, S, 0.5, c, torch.float32, dtype, product)
    up_backward(dy, U, S, 0.5, c, torch.float32, None)  # a bias is seldom trained
    assert dS is not None
    down_backward(x, dS, seed, dropout, torch.float32)
    if dtype != torch.float32:  # fp32 has the cuBLAS plan alone
        # Rows of a slice, 8 bytes apart from those of its base, are no matrix to a tensor descriptor.
        strided = torch.empty(_M, _K + 4, dtype=dtype)[:, :_K]
        for tokens in (x, strided):
            apply(tokens, W, bias, S, U, 0.5, None)
            dgrad(tokens, W, dS, D, seed, dropout, None)
        apply(x, W[:NARROW], bias[:NARROW], S, U[:NARROW], 0.5, None)


def _features(
    dtype: torch.dtype,
    r: int,
    orientation: str = "out",
    depth: int = 0,
    adapter_dtype: torch.dtype = torch.float32,
) -> None:
    W = torch.empty(_N, _K, dtype=dtype)
    A = torch.empty(r, _N if orientation == "out" else _K, dtype=adapter_dtype)
    chain = torch.empty(2 * depth, r, r) if depth else None
    H, Z = features.forward(W, A, chain, orientation, "sin2pi")
    features.backward(H, W, Z, chain, orientation, "sin2pi", torch.float32, chain is not None)
    if chain is not None and orientation == "out":
        through_chain(Parts(torch.empty(8, *Z.shape), 1.0), Z, chain, "sin2pi", True)


def _frozen_chain(dtype: torch.dtype, r: int) -> None:
    """What the backward launches where A is trained and the chain is not."""
    W, Z, dH = torch.empty(_N, _K, dtype=dtype), torch.empty(_N, r), torch.empty(_N, r)
    for depth in (1, 2):
        chain = torch.empty(2 * depth, r, r)
        for orientation in ("out", "in"):
            features.backward(dH, W, Z, chain, orientation, "sin2pi", torch.float32, False)
        through_chain(Parts(torch.empty(8, *Z.shape), 1.0), Z, chain, "sin2pi", False)


def _small(dtype: torch.dtype, r: int, adapter_dtype: torch.dtype = torch.float32) -> None:
    """Both orientations, for few tokens and for all that r leaves room for."""
    W, bias = torch.empty(_N, _K, dtype=dtype), torch.empty(_N, dtype=dtype)
    branch = Branch(0.5, 0.0, None)
    for orientation, columns in (("out", _N), ("in", _K)):
        for tokens in sorted({16, 32, most_of_a_small_batch(orientation, r)}):
            x, dy = torch.empty(tokens, _K, dtype=dtype), torch.empty(tokens, _N, dtype=dtype)
            A, B = torch.empty(r, columns, dtype=adapter_dtype), torch.empty(columns, r, dtype=adapter_dtype)
            network = (None, None, orientation, "sin2pi", branch)
            _, S, H, Z = small_batch.forward(x, W, bias, A, B, *network)
            dtypes = (adapter_dtype, adapter_dtype, False, None)
            small_batch.backward(dy, x, W, B, None, S, H, Z, *network[1:], *dtypes)


def _small_tokens(dtype: torch.dtype, r: int, dropout: float = 0.0, compute_dtype: torch.dtype | None = None) -> None:
    """What a small batch launches beside its reads of W, as forward and as backward call it."""
    c = compute_dtype or dtype
    x, P = torch.empty(16, _K, dtype=dtype), torch.empty(8, 16, _N)
    D, U, S, bias = torch.empty(_K, r), torch.empty(_N, r), torch.empty(16, r, dtype=c), torch.empty(_N, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    finish_tokens(P, S, down_partial(x, D, seed, dropout, c), U, bias, 0.5, dtype)
    finish_tokens(P, S, None, U, None, 1.0, dtype, seed, dropout)


def _merge(dtype: torch.dtype, r: int, stochastic: bool = False) -> None:
    """A Linear's layout and a Conv1D's, with fp32 factors."""
    D, U = torch.empty(_K, r), torch.empty(_N, r)
    seed = torch.zeros(1, dtype=torch.int64) if stochastic else None
    for W in (torch.empty(_N, _K, dtype=dtype), torch.empty(_K, _N, dtype=dtype).t()):
        merge(W, D, U, 0.5, seed)


def _matrix(launch: Launch, words: str, rows: int) -> tuple[str, ...]:
    """The matrix instructions meant for operands of a type, accumulated in tiles of so many rows.

    Warp groups and tensor memory take 64 rows at least; smaller tiles are left to the instructions of a warp.
    """
    if not launch.target.is_cuda:
        return (f"mfma {words.replace('tf32', 'f32')}",)
    if launch.target.name == "sm_90" and rows >= 64:
        return (f"wgmma {words}",)
    if launch.target.name == "sm_100" and rows >= 64:
        # One kind for both half types.
        return (f"tcgen05 {words.replace('bf16', 'f16')}",)
    return (f"mma.sync {words}",)


def _words(launch: Launch, name: str) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[launch.tensors[name].dtype]


def _compute_words(launch: Launch) -> str:
    """Of the operands' type where the kernel is told it; without, the product is fp32."""
    compute = launch.arguments.get("COMPUTE")
    return "tf32" if compute is None else {"bf16": "bf16", "fp16": "f16", "fp32": "tf32"}[compute.name]


def _narrow_words(launch: Launch, words: str, large: str) -> str:
    """Of the features' product with a narrow operand: an fp32 one may be taken apart over a large one in bf16."""
    apart = launch.arguments["PIECES"] and launch.tensors[large].dtype == torch.bfloat16
    return "bf16" if words == "tf32" and apart else words


def _reads(*names: str) -> dict[str, int]:
    """16-byte accesses through these arguments, whose rows are aligned and contiguous in every case."""
    return dict.fromkeys(names, 16)


def _stored_tile(launch: Launch, name: str = "c_ptr") -> dict[str, int]:
    """An accumulator: on AMD a lane stores the rows of its matrix instruction, four values."""
    return {name: 16 if launch.target.is_cuda else 4 * launch.tensors[name].element_size()}


def _gemm(launch: Launch) -> Expectations:
    rows = launch.arguments["BLOCK_M"]
    base, low_rank = (_matrix(launch, _words(launch, name), rows) for name in ("a_ptr", "p_ptr"))
    aligned = [name for name in ("a_ptr", "b_ptr") if max(launch.tensors[name].stride()) % 8 == 0]
    return Expectations(_both(base, low_rank), {**_reads(*aligned), **_stored_tile(launch)})


def _gemm_descriptor(launch: Launch) -> Expectations:
    rows = launch.arguments["BLOCK_M"]
    base, low_rank = (_matrix(launch, _words(launch, name), rows) for name in ("a_desc", "p_ptr"))
    return Expectations(_both(base, low_rank), _reads("a_desc", "b_desc", "c_desc"))


def _product(launch: Launch, words: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """The matrix instructions and accesses of a product that a stage writes; none where it writes none."""
    if "c_ptr" not in launch.tensors:
        return (), {}
    return _matrix(launch, words, launch.arguments["BLOCK_M"]), _stored_tile(launch)


def _down(launch: Launch) -> Expectations:
    words = _words(launch, "s_ptr")
    mma, widths = _product(launch, words)
    return Expectations(_both(_matrix(launch, words, launch.arguments["BLOCK_M"]), mma), {**_reads("x_ptr"), **widths})


def _finish(launch: Launch) -> Expectations:
    return Expectations(*_product(launch, _words(launch, "ds_ptr")))


def _down_backward(launch: Launch) -> Expectations:
    return Expectations(_matrix(launch, _words(launch, "ds_ptr"), launch.arguments["BLOCK_K"]), _reads("x_ptr"))


def _up_backward(launch: Launch) -> Expectations:
    """dS accumulates in BLOCK_M rows, dU and, but for an fp32 dy, dbias in BLOCK_N."""
    words, tall = _compute_words(launch), launch.arguments["BLOCK_N"]
    meant = [_matrix(launch, words, rows) for rows in (launch.arguments["BLOCK_M"], tall)]
    if "dbias_ptr" in launch.tensors and launch.tensors["dy_ptr"].dtype != torch.float32:
        meant.append(_matrix(launch, _words(launch, "dy_ptr"), tall))
    return Expectations(_both(*meant), _reads("dy_ptr"))


def _both(*meant: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in meant for name in names))


def _weight(launch: Launch) -> Expectations:
    """With a chain, features that are whole after one piece go through it at once.

    From 64 rows an fp16 W under fp32 is loaded as the instruction wants its operand, 8 bytes at a time.
    """
    rows, words = launch.arguments["BLOCK_M"], _narrow_words(launch, _compute_words(launch), "w_ptr")
    chain = launch.arguments.get("DEPTH") and not launch.arguments["SPLIT"]
    mma = _both(_matrix(launch, words, rows), _matrix(launch, "tf32", rows) if chain else ())
    as_operand = words == "tf32" and launch.tensors["w_ptr"].dtype == torch.float16 and rows >= 64
    return Expectations(mma, {"w_ptr": 8 if as_operand else 16})


def _chain(launch: Launch) -> Expectations:
    if not launch.arguments["DEPTH"]:
        return Expectations()
    return Expectations(_matrix(launch, "tf32", launch.arguments["BLOCK_M"]))


def _chain_backward(launch: Launch) -> Expectations:
    """The gradient of the chain, where it is needed, accumulates in BLOCK_R rows."""
    names = ("BLOCK_M", "BLOCK_R") if launch.arguments["NEED_DCHAIN"] else ("BLOCK_M",)
    heights = [launch.arguments[name] for name in names]
    return Expectations(_both(*(_matrix(launch, "tf32", rows) for rows in heights)))


def _merged(launch: Launch) -> Expectations:
    """fp32 products for a W of any dtype, and at least two blocks a multiprocessor that read it."""
    mma = _matrix(launch, "tf32", launch.arguments["BLOCK_N"])
    return Expectations(mma, {**_reads("w_ptr"), **_stored_tile(launch, "out_ptr")}, blocks_per_multiprocessor=2)


def _stacked(launch: Launch) -> Expectations:
    rows = launch.arguments["BLOCK_M"]
    tokens, narrow = (_matrix(launch, words, rows) for words in (_words(launch, "t_ptr"), _compute_words(launch)))
    return Expectations(_both(tokens, narrow), _reads("v_ptr"))


def _crossed(launch: Launch) -> Expectations:
    """P accumulates in BLOCK_M rows, the narrow product in BLOCK_L."""
    tokens = _matrix(launch, _words(launch, "t_ptr"), launch.arguments["BLOCK_M"])
    narrow = _matrix(launch, _narrow_words(launch, _compute_words(launch), "v_ptr"), launch.arguments["BLOCK_L"])
    return Expectations(_both(tokens, narrow), _reads("v_ptr"))


def _down_partial(launch: Launch) -> Expectations:
    return Expectations(_matrix(launch, _compute_words(launch), launch.arguments["BLOCK_M"]), _reads("x_ptr"))


def _finish_tokens(launch: Launch) -> Expectations:
    return Expectations(_matrix(launch, _words(launch, "s_ptr"), launch.arguments["BLOCK_M"]), _reads("partial_ptr"))


def _sum(launch: Launch) -> Expectations:
    return Expectations()


MEANT: dict[str, Callable[[Launch], Expectations]] = {
    "gemm._gemm_kernel": _gemm,
    "gemm_descriptor._gemm_descriptor_kernel": _gemm_descriptor,
    "down._down_kernel": _down,
    "down_backward._down_backward_kernel": _down_backward,
    "up_backward._up_backward_kernel": _up_backward,
    "up_finish._finish_kernel": _finish,
    "reduce._reduce_kernel": _sum,
    "features._project_kernel": _weight,
    "features._chain_forward_kernel": _chain,
    "features_backward._weight_kernel": _weight,
    "features_backward._chain_backward_kernel": _chain_backward,
    "merge._merge_kernel": _merged,
    "small_reads._stacked_kernel": _stacked,
    "small_reads._crossed_kernel": _crossed,
    "small_tokens._down_partial_kernel": _down_partial,
    "small_tokens._finish_tokens_kernel": _finish_tokens,
}

CASES = list(_cases())
