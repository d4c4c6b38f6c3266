"""The merge kernel and its torch twin: numbers, layouts, bounds, stochastic rounding, and the choice of a backend."""

import math

import guards
import pytest
import torch
from harness import DEVICE, DTYPES, INTERPRETED, interpreter_only
from test_launch_tables import DIFFERENT, pretend

import neat_kernels as nk
from neat_kernels.kernels import launch
from neat_kernels.kernels.merge import merge
from neat_kernels.torch_backend import merge as torch_merge

BF16 = torch.bfloat16
SHAPES = [(1, 1, 1), (1, 70, 3), (70, 1, 4), (37, 67, 1), (65, 33, 5), (96, 128, 16), (33, 70, 33), (45, 40, 128)]
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF)


def key(seed):
    return torch.tensor([seed], device=DEVICE)


def dyadic(*shape, dtype=torch.float32):
    """Multiples of 1/8 in [-2, 2]: sums of products of a few are exact in fp32, whatever their order."""
    return (torch.randint(-16, 17, shape, device=DEVICE) / 8).to(dtype)


def draw(N, K, r, dtype):
    """W on a fine grid around 1, so that W + ΔW falls between the numbers of a half dtype."""
    W = (1 + torch.randint(0, 128, (N, K), device=DEVICE) / 128).to(dtype)
    return W, dyadic(K, r), dyadic(N, r)


def exact(W, D, U, scaling):
    return W.double() + scaling * U.double() @ D.double().t()


def lay(W, layout):
    if layout == "transposed":
        return W.t().contiguous().t()
    if layout == "slice":
        return W.repeat(1, 2)[:, : W.shape[1]]
    if layout == "transposed slice":
        return W.t().repeat(1, 2)[:, : W.shape[0]].t()
    return W.repeat_interleave(2, 1)[:, ::2] if layout == "every second" else W


LAYOUTS = ("transposed", "slice", "transposed slice", "every second")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestNumbers:
    def test_one_rounding_of_an_exact_sum(self, dtype, shape):
        W, D, U = draw(*shape, dtype)
        merged, finite = merge(W, D, U, 0.5, None)
        assert finite
        assert torch.equal(merged, exact(W, D, U, 0.5).to(dtype))

    def test_within_the_rounding_of_fp32(self, dtype, shape):
        N, K, r = shape
        W, D, U = torch.randn(N, K, device=DEVICE).to(dtype), torch.randn(K, r), torch.randn(N, r)
        D, U = D.to(DEVICE), U.to(DEVICE)
        merged, _ = merge(W, D, U, 0.7, None)
        # r products and sums, the scaling and the sum with W, then half a unit in the last place of W's dtype.
        size = W.double().abs() + 0.7 * U.double().abs() @ D.double().abs().t()
        error = (merged.double() - exact(W, D, U, 0.7)).abs()
        # Three TF32 products keep 22 bits of a factor, and drop the product of the remainders.
        relative = (r + 3) * 2.0**-24 + (3 * 2.0**-22 if launch.branch_precision(DEVICE) == "tf32x3" else 0.0)
        assert (error <= relative * size + torch.finfo(dtype).eps / 2 * merged.double().abs()).all()


@pytest.mark.parametrize("factors", [(torch.float32, BF16), (BF16, torch.float32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_half_factors_are_not_rounded_to_each_others_dtype(layout, factors):
    W, D, U = draw(37, 70, 3, BF16)
    # 1 + 2⁻¹² is exact in fp32 alone.
    D, U = ((t + 2.0**-12).to(dtype) for t, dtype in zip((D, U), factors, strict=True))
    W = lay(torch.zeros_like(W, dtype=torch.float32), layout)
    merged, _ = merge(W, D, U, 1.0, None)
    torch.testing.assert_close(merged.double(), exact(W, D, U, 1.0), rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("seed", [None, 77])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_w_changes_no_bit_and_is_kept(layout, seed):
    W, D, U = draw(70, 45, 5, BF16)
    strided, seed = lay(W, layout), None if seed is None else key(seed)
    merged, _ = merge(strided, D, U, 0.5, seed)
    assert torch.equal(merged, merge(W, D, U, 0.5, seed)[0])
    assert merged.stride() == torch.empty_like(strided).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w_layout", ["plain", "transposed"])
def test_factors_with_any_strides(w_layout, layout):
    W, D, U = draw(70, 45, 5, BF16)
    W = lay(W, w_layout)
    expected, _ = merge(W, D, U, 0.5, None)
    assert torch.equal(merge(W, lay(D, layout), U, 0.5, None)[0], expected)
    assert torch.equal(merge(W, D, lay(U, layout), 0.5, None)[0], expected)


def assert_guarded(W, D, U, seed):
    plain = merge(W, D, U, 0.5, seed)
    watch = guards.GuardBands()
    inputs = [watch.input(t) for t in (W, D, U, seed)]
    with watch:
        guarded = merge(*inputs[:3], 0.5, inputs[3])
    assert [banded.view.dtype for banded in watch.allocated] == [W.dtype, torch.int32]
    watch.check()
    assert torch.equal(guarded[0], plain[0])
    assert guarded[1] is plain[1] is True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_else_is_read_or_written(dtype, shape):
    W, D, U = draw(*shape, dtype)
    assert_guarded(W, D, U, None)
    if dtype == BF16:
        assert_guarded(W, D, U, key(5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_else_is_read_or_written_between_strides(layout):
    W, D, U = draw(70, 45, 5, BF16)
    for seed in (None, key(5)):
        assert_guarded(lay(W, layout), D, U, seed)


@interpreter_only
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize(("dtype", "r"), [(BF16, 5), (torch.float32, 33), (torch.float16, 128)], ids=str)
@pytest.mark.parametrize("arch", DIFFERENT)
def test_tiles_of_every_device(arch, dtype, r, layout, monkeypatch):
    W, D, U = draw(139, 70, r, dtype)
    W, seed = lay(W, layout), key(3) if dtype == BF16 else None
    # The interpreter's own tiles, before the others take their place.
    expected, _ = merge(W, D, U, 0.5, seed)
    pretend(monkeypatch, arch)
    merged, finite = merge(W, D, U, 0.5, seed)
    assert finite
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("which", ["W", "D", "U"])
@pytest.mark.parametrize("seed", [None, 5])
def test_what_is_not_finite_is_told(seed, which, value):
    for at in (0, -1):
        tensors = dict(zip("WDU", draw(70, 45, 3, BF16), strict=True))
        tensors[which][at, at] = value
        _, finite = merge(*tensors.values(), 0.5, None if seed is None else key(seed))
        assert finite is False


def test_an_overflow_of_fp16_is_told():
    W, D, U = draw(70, 45, 3, torch.float16)
    D[-1], U[-1] = 200.0, 200.0
    assert merge(W, D, U, 0.5, None)[1] is True
    assert merge(W, D, U, 0.6, None)[1] is False


class TestStochasticRounding:
    def numbers(self):
        """fp32 numbers of every kind, [n, 64], each beside its neighbours."""
        bits = [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x10001, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x3FFFFFFF]
        bits += [0x7F7EFFFF, 0x7F7F0000, 0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
        values = torch.tensor(bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
        drawn = torch.randint(0, 0x7F7F0000, (480,), dtype=torch.int32, device=DEVICE).view(torch.float32)
        return torch.cat([values, -values, drawn, -drawn])[:, None].expand(-1, 64)

    def both(self, v, seed):
        """v rounded by the kernel and by torch; the kernel gets it as the exact sum of a bf16 and 16 bits more."""
        cut = (v.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
        rest = torch.where(v.isfinite(), v - cut, 0.0)[:, :1]
        kernel, _ = merge(cut.to(BF16), torch.ones(v.shape[1], 1, device=DEVICE), rest, 1.0, key(seed))
        index = torch.arange(v.numel(), device=DEVICE).view(v.shape)
        return kernel, torch_merge.round_stochastically(v.contiguous(), key(seed), index)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_every_kind_of_number(self, seed):
        v = self.numbers()
        if not INTERPRETED:
            # Tensor cores may take a subnormal remainder for zero.
            v = v[(v[:, 0].abs() > 2.0**-100) | (v[:, 0] == 0)]
        kernel, ours = self.both(v, seed)
        assert same(kernel, ours)

    def test_what_is_not_finite_and_the_largest_numbers_are_rounded_to_the_nearest(self):
        v = self.numbers()
        largest = torch.finfo(BF16).max
        kernel, _ = self.both(v, 4)
        at_the_end = ~(v.abs() < largest)
        assert same(kernel[at_the_end], v[at_the_end].to(BF16))
        assert (kernel[~at_the_end].abs() <= largest).all()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("layout", ["plain", "transposed"])
    def test_the_merge_of_the_torch_backend(self, layout, shape):
        W, D, U = draw(*shape, BF16)
        W = lay(W, layout)
        for seed in SEEDS[-2:]:
            kernel, theirs = (fn(W, D, U, 0.5, key(seed)) for fn in (merge, torch_merge.merge))
            assert torch.equal(kernel[0], theirs[0])
            assert kernel[0].stride() == theirs[0].stride()

    def test_a_sum_that_no_bf16_is_goes_both_ways_and_a_bf16_goes_none(self):
        W, D, U = draw(64, 64, 3, BF16)
        total = exact(W, D, U, 0.5)
        down, up = neighbours(total)
        merged = merge(W, D, U, 0.5, key(1))[0].double()
        assert ((merged == down) | (merged == up)).all()
        between = down != up
        assert (merged == down)[between].any()
        assert (merged == up)[between].any()
        assert not between.all()

    def test_rows_and_columns_round_independently(self):
        up = self.both(torch.full((64, 64), 1 + 2.0**-8, device=DEVICE), 3)[0].double() > 1
        assert len({tuple(row) for row in up.tolist()}) == 64
        assert len({tuple(column) for column in up.t().tolist()}) == 64

    @pytest.mark.parametrize("fraction", [2.0**-9, 0.125, 0.5, 0.75 + 2.0**-16])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_the_mean_is_the_number(self, sign, fraction):
        v = torch.full((512, 64), sign * (1 + fraction * 2.0**-7), device=DEVICE)
        merged = self.both(v, 11)[0].double()
        ulp = 2.0**-7
        assert (merged.mean() - v[0, 0].double()).abs() <= hoeffding(v.numel(), ulp)

    def test_another_seed_rounds_otherwise(self):
        W, D, U = draw(64, 64, 3, BF16)
        results = [merge(W, D, U, 0.5, key(seed))[0] for seed in (1, 1, 2, 1 + 2**32)]
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        assert not torch.equal(results[0], results[3])


def same(a, b):
    """Whether two tensors are equal, where a NaN equals a NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def neighbours(total):
    """The bf16 at or below and at or above numbers of float64, as float64."""
    bits = total.abs().float().view(torch.int32)
    low, high = ((bits & ~0xFFFF), (bits + 0xFFFF) & ~0xFFFF)
    low, high = (t.view(torch.float32).double() * total.sign() for t in (low, high))
    return torch.minimum(low, high), torch.maximum(low, high)


def hoeffding(count, width=1.0, probability=1e-9):
    """What a mean of `count` numbers in an interval of `width` exceeds its expectation by with this probability."""
    return width * math.sqrt(math.log(2 / probability) / (2 * count))


class TestTheLayer:
    def make(self, dtype=BF16, r=3, backend="triton", **options):
        layer = nk.FusedNeatLinear(45, 70, r=r, backend=backend, device=DEVICE, dtype=dtype, **options)
        with torch.no_grad():
            layer.weight.copy_(1 + torch.randint(0, 128, (70, 45), device=DEVICE) / 128)
            layer.neat_B.copy_(dyadic(*layer.neat_B.shape))
        return layer

    @pytest.mark.parametrize("orientation", ["out", "in"])
    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_merges_with_the_kernel(self, rounding, orientation, monkeypatch):
        layer = self.make(orientation=orientation, activation="gelu", scaling=0.5)
        seed = None if rounding == "nearest" else 5
        calls = []
        monkeypatch.setattr(
            "neat_kernels.kernels.merge.merge", lambda *args: calls.append(args) or merge(*args), raising=True
        )
        expected = layer.merged_weight(rounding=rounding, seed=seed)
        layer.merge(rounding=rounding, seed=seed)
        assert len(calls) == 2
        assert torch.equal(layer.weight, expected)
        W, D, U, scaling, drawn = calls[0]
        assert torch.equal(W, layer.base_weight)
        assert scaling == 0.5
        torch.testing.assert_close(scaling * U.float() @ D.float().t(), layer.delta_weight())
        assert drawn is None if seed is None else drawn.tolist() == [5]

    def test_a_conv1d_rounds_the_same_elements_the_same_way(self):
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(70, 45).to(DEVICE, BF16)
        layer = self.make(activation="identity")
        with torch.no_grad():
            conv1d.weight.copy_(layer.weight.t())
        other = nk.FusedNeatLinear.from_linear(conv1d, r=3, activation="identity", backend="triton", dtype=BF16)
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if "neat" in k}, strict=False)
        for options in ({}, {"rounding": "stochastic", "seed": 3}):
            merged = other.merged_weight(**options)
            assert merged.is_contiguous()
            assert torch.equal(merged.t(), layer.merged_weight(**options))

    def test_a_sum_that_is_not_finite_changes_nothing(self):
        for rounding in ("nearest", "stochastic"):
            layer = self.make(activation="identity")
            weight, before = layer.weight, layer.weight.detach().clone()
            with torch.no_grad():
                layer.neat_B[-1, -1] = float("inf")
            with pytest.raises(ValueError, match="finite"):
                layer.merge(rounding=rounding)
            assert not layer.merged
            assert layer.weight is weight
            assert torch.equal(weight, before)

    def test_stochastic_rounding_of_another_dtype_is_refused(self):
        for dtype in (torch.float32, torch.float16):
            with pytest.raises(ValueError, match=f"expected a torch.bfloat16 weight, got {dtype}"):
                self.make(dtype).merge(rounding="stochastic")

    @pytest.mark.parametrize(("options", "match"), [({"dtype": torch.float64}, "float64"), ({"r": 129}, "r up to 128")])
    def test_what_the_kernels_do_not_take(self, options, match):
        layer = self.make(**options)
        with pytest.raises(nk.BackendUnavailableError, match=match):
            layer.merge()
        assert not layer.merged
        layer.backend = "torch"
        expected = layer.merged_weight()
        layer.backend = "auto"
        layer.merge()
        assert torch.equal(layer.weight, expected)

    @interpreter_only
    def test_on_a_cpu_auto_takes_torch(self, monkeypatch):
        monkeypatch.setattr("neat_kernels.kernels.merge.merge", lambda *args: pytest.fail("the kernel was called"))
        self.make(backend="auto").merge()

    def test_a_model(self):
        from torch import nn

        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)).to(DEVICE, BF16)
        nk.apply_neat(model, nk.NeatConfig(r=2, target_modules="all-linear", backend="triton", activation="gelu"))
        for layer in model:
            nn.init.normal_(layer.neat_B)
        expected = [layer.merged_weight(rounding="stochastic", seed=7 + i) for i, layer in enumerate(model)]
        nk.merge_neat(model, rounding="stochastic", seed=7)
        for layer, weight in zip(model, expected, strict=True):
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, weight)
