"""Every kernel reads and writes what it should and nothing else, and writes all of it.

The host code is called directly, with every input and every allocation between guard bands of NaN; the results must be
those of a plain call, bit for bit.
"""

import guards
import pairwise
import pytest
import torch
import triton
import triton.language as tl
from harness import DEVICE, interpreter_only, token_backend, use_multiprocessors

from neat_kernels.kernels import features, low_rank, neat
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.torch_backend.neat import Wanted
from neat_kernels.vocabulary import ORIENTATIONS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 31, 3),
    (35, 41, 67, 16),
    (70, 31, 33, 33),
    (3, 5, 297, 4),
    (297, 5, 3, 4),
    (3, 297, 5, 4),
]


def randn(*shape, dtype=F32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_guarded(fn, *args):
    """Run fn plainly and between guard bands; both must return the same bits, which are returned."""
    plain = fn(*args)
    watch = guards.GuardBands()
    inputs = [watch.input(a) if isinstance(a, torch.Tensor) else a for a in args]
    with watch:
        guarded = fn(*inputs)
    assert watch.allocated
    watch.check()
    for ours, expected in zip(guarded, plain, strict=True):
        assert torch.equal(ours, expected)
    return guarded


@pytest.fixture(params=[0, 1000], ids=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    use_multiprocessors(monkeypatch, request.param)


def token_tensors(shape, dtype, adapter_dtype):
    tokens, out_features, in_features, r = shape
    return {
        "x": randn(tokens, in_features, dtype=dtype),
        "weight": randn(out_features, in_features, dtype=dtype),
        "bias": randn(out_features, dtype=dtype),
        "down": randn(in_features, r, dtype=adapter_dtype),
        "up": randn(out_features, r, dtype=adapter_dtype),
    }


TOKEN_SIDE = pairwise.rows(
    {
        "shape": SHAPES,
        "dtypes": [(F32, F32, None), (BF16, F32, None), (F16, F32, F32)],
        "dropout": [0.0, 0.4],
        "plan": ["fused", "cublas"],
        "bias": [False, True],
        "multiprocessors": [0, 1000],
    }
)


@pytest.mark.parametrize("row", TOKEN_SIDE, ids=pairwise.name)
def test_token_side(row, monkeypatch):
    use_multiprocessors(monkeypatch, row["multiprocessors"])
    shape, plan, dropout, (dtype, adapter_dtype, compute_dtype) = (
        row[name] for name in ("shape", "plan", "dropout", "dtypes")
    )
    t = token_tensors(shape, dtype, adapter_dtype)
    seed = torch.tensor([77], device=DEVICE) if dropout else None
    branch = Branch(0.7, dropout, compute_dtype, token_backend(plan, dtype))
    bias = t["bias"] if row["bias"] else None
    assert_guarded(low_rank.forward, t["x"], t["weight"], bias, t["down"], t["up"], seed, branch)
    S = randn(shape[0], shape[3], dtype=compute_dtype or dtype)
    dy = randn(shape[0], shape[1], dtype=dtype)
    needs = Needs(True, adapter_dtype, adapter_dtype, dtype)
    assert_guarded(low_rank.backward, dy, t["x"], t["weight"], t["down"], t["up"], S, seed, branch, needs)


@pytest.mark.parametrize(
    "needs",
    [(True, None, None, None), (False, F32, None, None), (False, None, F32, None), (False, None, None, F32)],
    ids=["dx", "ddown", "dup", "dbias"],
)
def test_token_side_backward_one_gradient_at_a_time(pieces, needs):
    needs = Needs(*needs)
    t = token_tensors((37, 269, 41, 5), F32, F32)
    factors = needs.dx or needs.ddown is not None
    assert_guarded(
        low_rank.backward,
        randn(37, 269),
        t["x"] if needs.ddown is not None else None,
        t["weight"] if needs.dx else None,
        t["down"] if needs.dx else None,
        t["up"] if factors else None,
        randn(37, 5) if needs.dup is not None else None,
        None,
        Branch(1.0, 0.0, None, token_backend("fused", F32)),
        needs,
    )


@pytest.mark.parametrize("layout", ["transposed", "slice", "every second"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_token_side_between_strided_inputs(dropout, layout):
    def lay(t):
        if layout == "transposed":
            return t.t().contiguous().t()
        return t.repeat(1, 2)[:, : t.shape[1]] if layout == "slice" else t.repeat_interleave(2, 1)[:, ::2]

    def assert_same_as_contiguous(fn, *args):
        strided = [lay(a) if isinstance(a, torch.Tensor) and a.ndim == 2 else a for a in args]
        for ours, expected in zip(assert_guarded(fn, *strided), fn(*args), strict=True):
            torch.testing.assert_close(ours, expected)

    t = token_tensors((37, 43, 41, 5), BF16, F32)
    seed = torch.tensor([77], device=DEVICE) if dropout else None
    branch = Branch(0.7, dropout, None, "triton:fused:fused")
    assert_same_as_contiguous(low_rank.forward, *t.values(), seed, branch)
    S, dy = randn(37, 5, dtype=BF16), randn(37, 43, dtype=BF16)
    needs = Needs(True, F32, F32, BF16)
    assert_same_as_contiguous(low_rank.backward, dy, t["x"], t["weight"], t["down"], t["up"], S, seed, branch, needs)


FEATURES = pairwise.rows(
    {
        "shape": SHAPES,
        "dtype": [F32, BF16, F16],
        "depth": [0, 1, 2],
        "orientation": ORIENTATIONS,
        "multiprocessors": [0, 1000],
    }
)


@pytest.mark.parametrize("row", FEATURES, ids=pairwise.name)
def test_features(row, monkeypatch):
    use_multiprocessors(monkeypatch, row["multiprocessors"])
    dtype, depth, orientation = row["dtype"], row["depth"], row["orientation"]
    _, out_features, in_features, r = row["shape"]
    rows, columns = (in_features, out_features) if orientation == "out" else (out_features, in_features)
    weight, A = randn(out_features, in_features, dtype=dtype), randn(r, columns, dtype=dtype)
    chain = randn(2 * depth, r, r, dtype=dtype) / 4 if depth else None
    assert_guarded(features.forward, weight, A, chain, orientation, "sigmoid")
    Z, dH = randn(rows, r), randn(rows, r)
    assert_guarded(features.backward, dH, weight, Z, chain, orientation, "sigmoid", dtype, chain is not None)


@pytest.mark.parametrize(("dA_dtype", "need_dchain"), [(F32, False), (None, True)], ids=["dA", "dchain"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_features_backward_one_gradient_at_a_time(pieces, orientation, dA_dtype, need_dchain):
    weight = None if dA_dtype is None else randn(43, 299).t().contiguous().t()
    rows = 299 if orientation == "out" else 43
    Z, dH, chain = randn(rows, 5), randn(5, rows).t(), randn(4, 5, 5)
    assert_guarded(features.backward, dH, weight, Z, chain, orientation, "gelu", dA_dtype, need_dchain)


@pytest.mark.parametrize(
    ("dtypes", "need_dchain"),
    [((F32, BF16), True), ((None, F32), True), ((None, F32), False)],
    ids=["all", "dB and dchain", "dB"],
)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_both_sides_backward(pieces, orientation, depth, dtypes, need_dchain):
    tokens, out_features, in_features, r = 523, 37, 13, 3
    rows, columns = (in_features, out_features) if orientation == "out" else (out_features, in_features)
    chain = randn(2 * depth, r, r) if depth else None
    assert_guarded(
        neat.backward,
        randn(tokens, out_features, dtype=BF16),
        randn(tokens, in_features, dtype=BF16),
        randn(out_features, in_features, dtype=BF16),
        randn(columns, r),
        chain,
        randn(tokens, r, dtype=BF16),
        randn(rows, r),
        randn(rows, r),
        None,
        orientation,
        "sigmoid",
        Branch(0.7, 0.0, None, "triton:fused:fused"),
        Wanted(False, *dtypes, need_dchain and depth > 0, None),
    )


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, reach_load, reach_store, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + offs, mask=offs < n + reach_load, other=0.0)
    tl.store(y_ptr + offs, tile, mask=offs < n + reach_store)


@triton.jit
def _move_kernel(x_ptr, y_ptr, step, apart, BLOCK: tl.constexpr):
    """Program i reads 16 elements from 16·i on, and writes 16 of them, `step` apart, from i·apart on."""
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y_ptr + pid * apart + offs * step, tl.load(x_ptr + pid * BLOCK + offs))


class TestTheWatch:
    """The bands and the addresses see what they are for."""

    def guarded_copy(self, reach_load=0, reach_store=0):
        watch = guards.GuardBands()
        x = watch.input(randn(13))
        with watch:
            y = torch.empty_like(x)
            _copy_kernel[(1,)](x, y, 13, reach_load, reach_store, BLOCK=16)
        watch.check()

    @pytest.fixture
    def unchecked(self, monkeypatch):
        # The addresses would stop the kernel before it writes.
        for access in ("load", "store"):
            monkeypatch.setattr(guards._Launch, access, lambda *args: None)

    def test_a_right_kernel_passes(self):
        self.guarded_copy()

    def test_a_write_beyond_the_end(self, unchecked):
        with pytest.raises(AssertionError, match=r"surround of the torch\.float32 allocation \(13,\) was written"):
            self.guarded_copy(reach_store=1)

    def test_an_element_left_unwritten(self, unchecked):
        with pytest.raises(AssertionError, match="not fully written"):
            self.guarded_copy(reach_store=-1)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_an_integer_left_unwritten(self, dtype):
        with guards.GuardBands() as watch:
            flags = torch.empty(3, dtype=dtype, device=DEVICE)
        flags[:2] = 1
        with pytest.raises(AssertionError, match="not fully written"):
            watch.check()
        flags[2] = 0
        watch.check()

    def test_an_input_overwritten(self):
        watch = guards.GuardBands()
        x = watch.input(randn(13))
        x[5] += 1
        with pytest.raises(AssertionError, match="input 0 or its surround"):
            watch.check()

    def test_a_sentinel_overwritten(self):
        watch = guards.GuardBands()
        seed = watch.input(torch.tensor([5], device=DEVICE))
        seed.as_strided((2,), (1,)).zero_()
        with pytest.raises(AssertionError, match="input 0 or its surround"):
            watch.check()

    @pytest.mark.parametrize("allocate", ["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"])
    def test_every_way_to_allocate(self, allocate):
        like = torch.zeros(3, 4, device=DEVICE)
        with guards.GuardBands() as watch:
            t = {
                "empty": lambda: torch.empty(3, 4, device=DEVICE),
                "empty_like": lambda: torch.empty_like(like),
                "new_empty": lambda: like.new_empty((3, 4)),
                "empty_strided": lambda: torch.empty_strided((3, 4), (1, 3), device=DEVICE),
                "new_empty_strided": lambda: like.new_empty_strided((3, 4), (1, 3)),
            }[allocate]()
        assert len(watch.allocated) == 1
        assert t.isnan().all()
        t.fill_(1.0)
        watch.check()
        t.as_strided((1,), (1,), t.storage_offset() - 1).zero_()
        with pytest.raises(AssertionError, match="surround"):
            watch.check()

    @interpreter_only
    @pytest.mark.parametrize(("reach", "what"), [((1, 0), "load of 1 elements"), ((0, 2), "store of 2 elements")])
    def test_addresses_outside_the_arguments(self, reach, what):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=what):
            self.guarded_copy(*reach)

    @interpreter_only
    def test_addresses_between_the_elements_of_a_strided_argument(self):
        x, y = torch.randn(26)[::2], torch.zeros(13)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="load of 6 elements"):
            _copy_kernel[(1,)](x, y, 13, 0, 0, BLOCK=16)

    @interpreter_only
    @pytest.mark.parametrize(
        ("start", "step", "apart", "what"),
        [
            (32, 0, 16, "one store wrote an element twice"),
            (32, 1, 8, "a program wrote what another program wrote"),
            (16, 1, 16, "a program read what another program wrote"),
            (32, 1, -32, "a program wrote what another program read"),
        ],
        ids=str,
    )
    def test_programs_that_race(self, start, step, apart, what):
        buffer = torch.zeros(64)
        _move_kernel[(2,)](buffer, buffer[32:], 1, 16, BLOCK=16)
        with pytest.raises(triton.runtime.errors.InterpreterError, match=what):
            _move_kernel[(2,)](buffer, buffer[start:], step, apart, BLOCK=16)
