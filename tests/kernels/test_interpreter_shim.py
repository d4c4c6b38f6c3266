"""Triton's interpreter made right for bf16: it computes what a GPU would or raises, and nothing of it stays changed."""

import pytest
import torch
import triton
import triton.language as tl
from harness import interpreter_only
from triton.runtime import interpreter

from neat_kernels.kernels.interpreter import faithful

pytestmark = interpreter_only

BF16 = torch.bfloat16
NAN, INF = float("nan"), float("inf")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    offs_m, offs_k, offs_n = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, COLUMNS)
    a = tl.load(a_ptr + offs_m[:, None] * INNER + offs_k[None, :])
    b = tl.load(b_ptr + offs_k[:, None] * COLUMNS + offs_n[None, :])
    c_ptrs = c_ptr + offs_m[:, None] * COLUMNS + offs_n[None, :]
    tl.store(c_ptrs, tl.dot(a, b, tl.load(c_ptrs)))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, c_ptr, OPERATION: tl.constexpr):
    offs = tl.arange(0, 16)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "subtract":
        c = a - b
    elif OPERATION == "multiply":
        c = a * b
    elif OPERATION == "divide":
        c = a / b
    elif OPERATION == "scale":
        c = a * 2.0
    elif OPERATION == "negate":
        c = -a
    elif OPERATION == "absolute":
        c = tl.abs(a)
    elif OPERATION == "maximum":
        c = tl.maximum(a, b)
    elif OPERATION == "less":
        c = tl.where(a < b, 1.0, 0.0)
    elif OPERATION == "fma":
        c = tl.fma(a, b, a)
    elif OPERATION == "select":
        c = tl.where(offs < 7, a, b)
    elif OPERATION == "sum":
        c = tl.zeros((16,), tl.float32) + tl.sum(a, axis=0)
    elif OPERATION == "largest":
        c = tl.zeros((16,), tl.float32) + tl.max(a, axis=0)
    elif OPERATION == "reduce":
        c = tl.zeros((16,), tl.float32) + tl.reduce(a, 0, _add)
    else:
        tl.static_assert(OPERATION == "cumsum")
        c = tl.cumsum(a, axis=0)
    tl.store(c_ptr + offs, c.to(tl.float32))


# Small integers: every result is exact in bf16.
EXPECTED = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "scale": lambda a, b: 2 * a,
    "negate": lambda a, b: -a,
    "absolute": lambda a, b: a.abs(),
    "maximum": torch.maximum,
    "less": lambda a, b: (a < b).float(),
    "fma": lambda a, b: a * b + a,
    "select": lambda a, b: torch.cat([a[:7], b[7:]]),
    "sum": lambda a, b: a.sum().expand(16),
    "largest": lambda a, b: a.max().expand(16),
    "reduce": lambda a, b: a.sum().expand(16),
    "cumsum": lambda a, b: a.cumsum(0),
}


def cast(x, dtype):
    y = torch.empty(len(x), dtype=dtype)
    with faithful():
        _cast_kernel[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)))
    return y


class TestCasts:
    def test_ties_go_to_even(self):
        step = 2.0**-7
        x = torch.tensor(
            [1.0, 1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, -1 - 3 * step / 2, 1 + step / 2 + 2.0**-20]
        )
        assert cast(x, BF16).tolist() == [1.0, 1.0, 1 + 2 * step, -1.0, -1 - 2 * step, 1 + step]

    def test_every_kind_of_number(self):
        x = torch.tensor([0.0, -0.0, INF, -INF, 3.4e38, -3.4e38, 1e-40, 2.0**-133, 65504.0])
        ours, expected = cast(x, BF16), x.to(BF16)
        assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))

    def test_a_nan_whose_payload_would_carry_into_infinity(self):
        x = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
        assert cast(x, BF16).isnan().all()

    def test_many_bit_patterns(self):
        bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
        x = bits.view(torch.float32)
        ours, expected = cast(x, BF16), x.to(BF16)
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(nan=3.0), expected.nan_to_num(nan=3.0))

    def test_widening_is_exact_for_every_bf16(self):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
        ours = cast(x, torch.float32)
        assert torch.equal(ours.isnan(), x.isnan())
        assert torch.equal(ours.nan_to_num(nan=3.0), x.float().nan_to_num(nan=3.0))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32], ids=str)
    def test_to_and_from_other_dtypes(self, dtype):
        x = torch.arange(-50, 50).to(BF16)
        assert torch.equal(cast(x, dtype), x.to(dtype))
        assert torch.equal(cast(x.to(dtype), BF16), x)


def test_bf16_dots_accumulate_in_fp32():
    a, b = torch.randn(32, 64).to(BF16), torch.randn(64, 16).to(BF16)
    c = torch.randn(32, 16)
    expected = c.double() + a.double() @ b.double()
    with faithful():
        _dot_kernel[(1,)](a, b, c, 32, 64, 16)
    assert (c.double() - expected).abs().max() < 64 * 2.0**-24 * (a.double().abs() @ b.double().abs()).max()


@pytest.mark.parametrize("operation", EXPECTED)
def test_arithmetic_is_right_or_refused(operation):
    a, b = torch.arange(-5.0, 11.0), torch.arange(8.0, -8.0, -1.0).where(torch.arange(16) != 8, 1.0)
    for dtype, refusable in ((torch.float32, False), (BF16, True)):
        c = torch.full((16,), NAN)
        try:
            with faithful():
                _arithmetic_kernel[(1,)](a.to(dtype), b.to(dtype), c, OPERATION=operation)
        except triton.runtime.errors.InterpreterError:
            assert refusable
        else:
            expected = EXPECTED[operation](a, b)
            assert torch.equal(c.to(dtype), expected.to(dtype))


@pytest.mark.parametrize("operation", ["add", "multiply", "negate", "less"])
def test_the_refusal_says_what_to_do(operation):
    a = torch.ones(16, dtype=BF16)
    with (
        pytest.raises(triton.runtime.errors.InterpreterError, match="no bf16 arithmetic: cast the tile to fp32"),
        faithful(),
    ):
        _arithmetic_kernel[(1,)](a, a, torch.empty(16), OPERATION=operation)


class TestNothingStaysChanged:
    OWNERS = (
        interpreter,
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor,
        interpreter.ReduceScanOpInterface,
        interpreter.ReduceOps,
        interpreter.ScanOps,
        interpreter.TensorHandle,
        tl,
        tl.core,
        tl.semantic.TritonSemantic,
    )

    @pytest.fixture(autouse=True)
    def _same_afterwards(self):
        before = [dict(vars(owner)) for owner in self.OWNERS]
        yield
        for owner, names in zip(self.OWNERS, before, strict=True):
            now = dict(vars(owner))
            assert now.keys() == names.keys()
            assert [name for name in now if now[name] is not names[name]] == []

    def test_after_a_kernel(self):
        cast(torch.ones(4), BF16)

    def test_after_an_exception(self):
        with pytest.raises(KeyError), faithful():
            raise KeyError

    def test_after_a_kernel_that_failed(self):
        a = torch.ones(16, dtype=BF16)
        with pytest.raises(triton.runtime.errors.InterpreterError), faithful():
            _arithmetic_kernel[(1,)](a, a, torch.empty(16), OPERATION="add")

    def test_nested(self):
        with faithful():
            inside = dict(vars(interpreter.InterpreterBuilder))
            with faithful():
                cast(torch.ones(4), BF16)
            assert dict(vars(interpreter.InterpreterBuilder)) == inside
