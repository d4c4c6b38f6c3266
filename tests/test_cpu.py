"""csrc against float64, bit by bit where it must be, and what happens where it is not there."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from budget import assert_within_budget, draw_case, evaluate

import neat_kernels as nk
from neat_kernels import cpu, selfcheck
from neat_kernels.torch_backend.gemm import rows_times, transposed_times

needs_csrc = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around every border of the tiles: 12 rows by 16 or 32 columns, panels of 256; 4 rows, strips of 64, panels of 64.
SHAPES = [
    (1, 1, 1),
    (12, 256, 16),
    (13, 257, 17),
    (64, 64, 4),
    (65, 65, 5),
    (11, 255, 31),
    (63, 63, 3),
    (130, 129, 2),
    (300, 530, 33),
    (40, 48, 64),
    (257, 65, 128),
    (3, 700, 130),
    (0, 33, 5),
    (13, 0, 5),
]
LAYOUTS = {
    "rows": lambda t: t.clone(),
    "columns": lambda t: t.t().contiguous().t(),
    "rows of a wider matrix": lambda t: surrounded(t),
    "columns of a wider matrix": lambda t: surrounded(t.t()).t(),
    "one row many times": lambda t: t[:1].expand_as(t),
}


def surrounded(t):
    """The values of t as a view inside NaN, at an address that is no multiple of anything."""
    buffer = torch.full((t.shape[0] + 2, t.shape[1] + 5), float("nan"), dtype=t.dtype)
    return buffer[1:-1, 3:-2].copy_(t)


@pytest.fixture
def every_size(monkeypatch):
    """Let csrc take the smallest matrices too."""
    for name in ("LEAST_WORK", "LEAST_ROWS", "LEAST_COLUMNS"):
        monkeypatch.setattr(cpu, name, 1)


def assert_is_product(got, left, right):
    """Each sum within the bound of an fp32 sum of so many terms, in whatever order."""
    left, right = left.double(), right.double()
    bound = left.shape[1] * 2.0**-24 * (left.abs() @ right.abs())
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert ((got - left @ right).abs() <= bound).all()


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_products(shape, layout, dtype):
    M, K, r = shape
    a = LAYOUTS[layout](torch.randn(M, K).to(dtype))
    b, p = surrounded(torch.randn(K, r)), surrounded(torch.randn(M, r))
    assert_is_product(cpu.rows_times(a, b), a, b)
    assert_is_product(cpu.transposed_times(a, p), p.t(), a)


@needs_csrc
@pytest.mark.parametrize("function", [cpu.rows_times, cpu.transposed_times])
def test_long_sums_are_as_accurate_as_those_of_torch(function):
    """A sum of 8,192 terms one after the other is not."""
    a, narrow = torch.randn(64, 8192), torch.randn(8192, 16)
    exact = a.double() @ narrow.double()
    ours = function(a, narrow) if function is cpu.rows_times else function(a.t().contiguous(), narrow).t()
    assert (ours - exact).norm() <= 2 * (a @ narrow - exact).norm()


@needs_csrc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_is_exact(dtype):
    """Every half number there is, subnormal ones and infinities too."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = halves.float()
    assert torch.equal(cpu.rows_times(halves[:, None], torch.ones(1, 1))[:, 0].nan_to_num(7.0), wide.nan_to_num(7.0))
    assert torch.equal(cpu.transposed_times(halves[None], torch.ones(1, 1))[0].nan_to_num(7.0), wide.nan_to_num(7.0))


# Operands end where a page begins that nobody may touch.
AT_THE_END_OF_A_PAGE = """
import ctypes, mmap, torch
from neat_kernels import cpu

libc, pages = ctypes.CDLL(None, use_errno=True), []

def at_the_end(t):
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    pages.append(memory)
    start = mmap.PAGESIZE - t.numel() * t.itemsize
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view_as(t).copy_(t)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for r in (3, 19):
        a, b, p = torch.randn(13, 37).to(dtype), torch.randn(37, r), torch.randn(13, r)
        assert torch.equal(cpu.rows_times(at_the_end(a), at_the_end(b)), cpu.rows_times(a, b))
        assert torch.equal(cpu.transposed_times(at_the_end(a), at_the_end(p)), cpu.transposed_times(a, p))
print("read nothing else")
"""


@needs_csrc
def test_nothing_beyond_the_operands_is_read():
    done = subprocess.run([sys.executable, "-c", AT_THE_END_OF_A_PAGE], capture_output=True, text=True)
    assert done.stdout == "read nothing else\n", done.stderr


@needs_csrc
@pytest.mark.parametrize("function", [cpu.rows_times, cpu.transposed_times])
def test_what_is_not_finite_spoils_its_own_sums_alone(function):
    a, narrow = torch.randn(40, 40), torch.randn(40, 20)
    clean = function(a, narrow)
    a[17, 3], a[5, 30] = float("nan"), float("inf")
    got = function(a, narrow)
    spoiled = torch.zeros_like(got, dtype=torch.bool)
    if function is cpu.rows_times:
        spoiled[[17, 5]] = True
    else:
        spoiled[:, [3, 30]] = True
    assert (~got[spoiled].isfinite()).all()
    assert torch.equal(got[~spoiled], clean[~spoiled])


@needs_csrc
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("odd", [torch._neg_view, torch.Tensor.to_sparse_csr])
def test_cached_features_and_tokens_of_another_kind(odd):
    """Cached features answer past the operator, which would see a negated tensor in the flesh."""
    layer = nk.FusedNeatLinear(256, 192, r=8).eval()
    torch.nn.init.normal_(layer.neat_B)
    x = odd(torch.randn(64, 256))
    plain = x.resolve_neg() if x.layout == torch.strided else x.to_dense()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(plain))


@needs_csrc
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("function", [cpu.rows_times, cpu.transposed_times])
def test_operands_that_do_not_fit_are_refused(function, columns):
    a = torch.randn(40, 40).t() if columns else torch.randn(40, 40)
    with pytest.raises(ValueError, match=r"expected 40 rows .* got \(39, 20\)"):
        function(a, torch.randn(39, 20))


@needs_csrc
@pytest.mark.parametrize("function", [cpu.rows_times, cpu.transposed_times])
def test_results_are_where_the_operands_are(function):
    a, narrow = torch.randn(40, 40), torch.randn(40, 20)
    with torch.device("meta"):
        got = function(a, narrow)
    assert torch.equal(got, function(a, narrow))


@needs_csrc
@pytest.mark.parametrize("function", [cpu.rows_times, cpu.transposed_times])
def test_a_sum_does_not_depend_on_the_number_of_threads(function):
    a, narrow = torch.randn(530, 700), torch.randn(530 if function is cpu.transposed_times else 700, 20)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(function(a, narrow))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_csrc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("shape", [(1, 17, 5, 3), (37, 127, 33, 16), (64, 48, 80, 33), (600, 31, 29, 4)], ids=str)
def test_a_layer_within_the_budget(every_size, shape, orientation, dtype):
    """y and every gradient against float64; half tokens in fp32, so that csrc has every product."""
    case = draw_case(*shape, dtype=dtype, adapter_dtype=torch.float32, orientation=orientation, depth=1)
    more = {} if dtype == torch.float32 else {"compute_dtype": torch.float32}
    fused = evaluate(nk.functional.neat_linear, case, backend="torch", **more)
    assert_within_budget(fused, evaluate(nk.reference.neat_linear, case, **more), case)


@needs_csrc
def test_a_layer_of_common_size_is_run_by_csrc(monkeypatch):
    calls = []
    library = cpu._library()
    counted = library._replace(
        rows_times=lambda *a: calls.append("rows") or library.rows_times(*a),
        transposed_times=lambda *a: calls.append("transposed") or library.transposed_times(*a),
    )
    monkeypatch.setattr(cpu, "_library", lambda: counted)
    layer = nk.FusedNeatLinear.from_linear(torch.nn.Linear(256, 192), r=8)
    layer(torch.randn(128, 256, requires_grad=True)).backward(torch.randn(128, 192))
    # S, dS and dA; Z, dD and dU.
    assert sorted(calls) == ["rows"] * 3 + ["transposed"] * 3
    assert "products of rank r by csrc" in str(layer.explain(torch.randn(1, 256)))
    assert "by torch: csrc takes no float64" in str(layer.double().explain(torch.randn(1, 256).double()))


@needs_csrc
@pytest.mark.parametrize(
    ("a", "narrow"),
    [
        (torch.randn(64, 600, dtype=torch.float64), torch.randn(600, 16)),
        (torch.randn(64, 600), torch.randn(600, 16, dtype=torch.float64)),
        (torch.randn(64, 600, 2)[..., 0], torch.randn(600, 16)),
        (torch.randn(64, 600).to(torch.float8_e4m3fn), torch.randn(600, 16)),
        (torch.randn(7, 4096), torch.randn(4096, 16)),
        (torch.randn(64, 100), torch.randn(100, 16)),
        (torch.randn(512, 600), torch.randn(600, 1)),
        (torch.empty(64, 600, device="meta"), torch.randn(600, 16)),
        (torch.randn(64, 600), torch.empty(600, 16, device="meta")),
        (torch._neg_view(torch.randn(64, 600)), torch.randn(600, 16)),
        (torch.randn(64, 600), torch._neg_view(torch.randn(600, 16))),
        (torch.randn(64, 600).to_mkldnn(), torch.randn(600, 16)),
    ],
    ids=[
        "float64", "float64 b", "strided", "fp8", "few rows", "little work", "one column", "meta", "meta b",
        "negated", "negated b", "layout of oneDNN",
    ],
)  # fmt: skip
def test_what_csrc_leaves_to_torch(a, narrow):
    assert cpu.takes(torch.randn(64, 600), torch.randn(600, 16))
    assert not cpu.takes(a, narrow)


@needs_csrc
def test_the_self_check_checks_csrc():
    for tokens in (selfcheck.TOKENS, selfcheck.OUT_FEATURES):
        a = torch.empty(tokens, min(selfcheck.IN_FEATURES, selfcheck.OUT_FEATURES))
        assert cpu.takes(a, torch.empty(a.shape[1], selfcheck.RANK))


def test_without_it_torch_computes_the_same(monkeypatch):
    a, b, p = torch.randn(300, 200).bfloat16(), torch.randn(200, 8), torch.randn(300, 8)
    monkeypatch.setattr(cpu, "_loaded", lambda: "not there")
    assert not cpu.takes(a, b)
    assert_is_product(rows_times(a, b, torch.float32), a, b)
    assert_is_product(transposed_times(a, p, torch.float32), p.t(), a)


class TestObstacles:
    @pytest.fixture(autouse=True)
    def _asked_anew(self):
        cpu._loaded.cache_clear()
        yield
        cpu._loaded.cache_clear()

    def test_another_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert cpu.obstacle() == "csrc needs a CPU with AVX-512, and torch reports AVX2"
        assert not cpu.takes(torch.randn(64, 600), torch.randn(600, 16))
        layer = nk.FusedNeatLinear(256, 192, r=8)
        assert "products of rank r by torch: csrc needs" in str(layer.explain(torch.randn(1, 256)))

    def test_not_built(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "was not built" in cpu.obstacle()

    def test_a_library_that_cannot_be_loaded(self, monkeypatch, tmp_path):
        broken = tmp_path / "_csrc.so"
        broken.write_bytes(b"no library")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: importlib.util.spec_from_file_location(name, broken)
        )
        assert cpu.obstacle().startswith("csrc could not be loaded: ")

    def test_the_command_says_so(self, monkeypatch):
        cli = pytest.importorskip("neat_kernels.cli")
        testing = pytest.importorskip("typer.testing")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        printed = testing.CliRunner().invoke(cli.app, ["env"], env={"COLUMNS": "200"}).output
        assert "csrc needs a CPU with AVX-512" in printed
