"""Merging W + ΔW and taking it apart again, of one layer and of a model."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import neat_kernels as nk
from neat_kernels.torch_backend import merge as torch_merge
from neat_kernels.torch_backend.dropout import philox
from neat_kernels.vocabulary import ORIENTATIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"r": 3, "activation": "identity", "scaling": 0.5}


def dyadic(*shape):
    """Multiples of 1/8 in [-2, 2]: products and sums of a few are exact in fp32, but their sum with W is not."""
    return torch.randint(-16, 17, shape).float() / 8


def make(dtype=torch.float32, conv=False, **options):
    base = Conv1D(20, 24).to(dtype) if conv else nn.Linear(24, 20, dtype=dtype)
    layer = nk.FusedNeatLinear.from_linear(base, **{**OPTIONS, **options})
    with torch.no_grad():
        for name, p in layer.named_parameters():
            # A fine grid around 1 for W, so that W + ΔW falls between the numbers of a half dtype.
            p.copy_(dyadic(*p.shape) if "neat" in name else 1 + torch.randint(0, 128, p.shape) / 128)
    return layer, base


def snapshot(module):
    state = {k: v.clone() for k, v in module.state_dict().items()}
    identities = {k: id(p) for k, p in module.named_parameters()}
    flags = {k: p.requires_grad for k, p in module.named_parameters()}
    return state, identities, flags


def unchanged(module, before):
    now = snapshot(module)
    same = now[0].keys() == before[0].keys() and all(
        torch.equal(now[0][k], before[0][k]) or (now[0][k].isnan() == before[0][k].isnan()).all() for k in now[0]
    )
    return same and now[1:] == before[1:]


class TestLayer:
    @pytest.mark.parametrize("conv", [False, True])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_sum_is_rounded_once(self, dtype, orientation, conv):
        layer, base = make(dtype, conv, orientation=orientation)
        W = base.weight.detach().double()
        delta = layer.delta_weight().double()
        exact = (W + (delta.t() if conv else delta)).to(dtype)
        if dtype in (torch.bfloat16, torch.float16):
            twice = W.to(dtype) + (delta.t() if conv else delta).to(dtype)
            assert not torch.equal(exact, twice), "the draw would not notice a second rounding"
        layer.merge()
        assert layer.weight.dtype == dtype
        assert layer.weight.shape == base.weight.shape
        assert torch.equal(layer.weight, exact)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("conv", [False, True])
    def test_a_large_layer_in_several_row_blocks(self, conv, dtype):
        base = Conv1D(700, 600).to(dtype) if conv else nn.Linear(600, 700, dtype=dtype)
        layer = nk.FusedNeatLinear.from_linear(base, **OPTIONS)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.copy_(torch.randint(-1, 2, p.shape) if "neat_A" in name else dyadic(*p.shape))
        W, delta = base.weight.detach().double(), layer.delta_weight().double()
        assert torch.equal(layer.merged_weight(), (W + (delta.t() if conv else delta)).to(dtype))

    @pytest.mark.parametrize("conv", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_unmerge_restores_the_weight_bit_for_bit(self, dtype, conv):
        layer, base = make(dtype, conv)
        weight, before = base.weight, base.weight.detach().clone()
        for _ in range(3):
            layer.merge()
            assert layer.merged
            assert not torch.equal(layer.weight, before)
            layer.unmerge()
            assert not layer.merged
            assert layer.weight is weight
            assert torch.equal(weight, before)

    def test_merging_does_not_touch_the_original_module(self):
        layer, linear = make()
        weight, before = linear.weight, linear.weight.detach().clone()
        layer.merge()
        assert linear.weight is weight is layer.base_weight
        assert torch.equal(weight, before)
        assert not layer.weight.requires_grad
        assert layer.weight.data_ptr() != weight.data_ptr()

    @pytest.mark.parametrize("conv", [False, True])
    def test_the_merged_layer_computes_what_the_layer_did(self, conv):
        layer, _ = make(torch.float64, conv, activation="gelu", depth=1)
        x = torch.randn(5, 24, dtype=torch.float64)
        expected = layer(x).detach()
        layer.eval().merge()
        y = layer(x)
        torch.testing.assert_close(y, expected)
        assert torch.equal(y, F.linear(x, layer.weight.t() if conv else layer.weight, layer.bias))
        layer.unmerge()
        assert torch.equal(layer(x), expected)

    def test_a_merge_after_another_adapter_starts_from_the_original(self):
        layer, linear = make(torch.bfloat16)
        W = linear.weight.detach().clone()
        layer.merge()
        layer.unmerge()
        with torch.no_grad():
            layer.neat_B.copy_(dyadic(*layer.neat_B.shape))
        layer.merge()
        assert torch.equal(layer.weight, (W.float() + layer.delta_weight()).bfloat16())

    def test_delta_weight_and_factors_of_a_merged_layer_are_of_the_original(self):
        layer, _ = make(activation="gelu")
        before = (layer.delta_weight(), *layer.lora_factors(), layer.merged_weight())
        layer.merge()
        for a, b in zip(before, (layer.delta_weight(), *layer.lora_factors(), layer.merged_weight()), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_merging_under_autocast_is_the_same(self, dtype):
        layer, _ = make(dtype, activation="gelu")
        expected = layer.merged_weight()
        with torch.autocast("cpu", torch.bfloat16):
            layer.merge()
        assert torch.equal(layer.weight, expected)

    def test_merging_in_inference_mode_leaves_a_usable_layer(self):
        layer, _ = make()
        layer.eval()
        with torch.inference_mode():
            layer.merge()
        x = torch.randn(5, 24, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1))

    def test_a_merged_layer_propagates_gradients_to_x_in_eval(self):
        layer, _ = make()
        layer.eval().merge()
        x = torch.randn(5, 24, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.abs().sum() > 0
        assert layer.neat_A.grad is None


class TestStochasticRounding:
    """The torch backend; tests/kernels/test_merge_kernel.py holds the kernel to its bits."""

    def test_every_random_number_once_gives_exactly_the_number(self, monkeypatch):
        monkeypatch.setattr(torch_merge, "philox", lambda seed, index: index << 16)
        index = torch.arange(2**16)
        for low in (0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
            for high in (0x3F80, 0x3FFF, 0x0000, 0x007F, 0x7F7E):
                v = torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32)
                for sign in (1, -1):
                    rounded = torch_merge.round_stochastically((sign * v).expand(2**16), torch.tensor([0]), index)
                    assert rounded.double().mean() == sign * v.double()
                    assert (rounded != rounded[0]).any() == (low != 0)

    def test_the_high_half_of_the_word_decides(self):
        seed, index = torch.tensor([5]), torch.arange(1000)
        low = 0x1234
        v = torch.full((1000,), 0x3F800000 + low, dtype=torch.int32).view(torch.float32)
        up = torch_merge.round_stochastically(v, seed, index) > 1
        assert torch.equal(up, (philox(seed, index) >> 16) + low >= 2**16)

    @pytest.mark.parametrize("fraction", [2.0**-9, 0.125, 0.5, 0.75 + 2.0**-16])
    def test_the_mean_of_a_million_is_the_number(self, fraction):
        torch.manual_seed(0)
        v = torch.full((2**20,), 1 + fraction * 2.0**-7)
        rounded = torch_merge.round_stochastically(v, torch.tensor([17]), torch.arange(2**20)).double()
        # Hoeffding: a mean of n numbers in an interval of one ulp is this far off with a probability of 1e-9.
        bound = 2.0**-7 * (math.log(2 / 1e-9) / (2 * 2**20)) ** 0.5
        assert (rounded.mean() - v[0].double()).abs() <= bound
        assert (v.bfloat16().double().mean() - v[0].double()).abs() > bound or fraction == 2.0**-9

    def test_a_mean_over_merges_is_the_sum(self):
        layer, base = make(torch.bfloat16)
        exact = base.weight.double() + layer.delta_weight().double()
        n = 2000
        mean = sum(layer.merged_weight(rounding="stochastic", seed=seed).double() for seed in range(n)) / n
        ulp = 2.0 ** (exact.abs().log2().floor() - 7)
        bound = ulp * (math.log(2 * exact.numel() / 1e-9) / (2 * n)) ** 0.5
        nearest = layer.merged_weight().double()
        assert ((mean - exact).abs() <= bound).all()
        assert ((nearest - exact).abs() > bound).any(), "rounding to the nearest would pass"

    def test_what_a_bf16_holds_stays(self):
        layer, base = make(torch.bfloat16)
        nn.init.zeros_(layer.neat_B)
        assert torch.equal(layer.merged_weight(rounding="stochastic", seed=1), base.weight)

    def test_row_blocks_and_layout_change_no_bit(self, monkeypatch):
        linear, conv = nn.Linear(600, 70).bfloat16(), Conv1D(70, 600).bfloat16()
        with torch.no_grad():
            conv.weight.copy_(linear.weight.t())
        layer, other = (nk.FusedNeatLinear.from_linear(base, **OPTIONS) for base in (linear, conv))
        with torch.no_grad():
            # One of the three ranks: a product of two numbers is the same in every block.
            layer.neat_A[1:] = 0.0
            layer.neat_B[:, 0] = dyadic(70)
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if "neat" in k}, strict=False)
        whole = layer.merged_weight(rounding="stochastic", seed=2)
        assert torch.equal(other.merged_weight(rounding="stochastic", seed=2).t(), whole)
        monkeypatch.setattr("neat_kernels.torch_backend.gemm.BLOCK_BYTES", 1)
        assert torch.equal(layer.merged_weight(rounding="stochastic", seed=2), whole)

    def test_the_seed_is_given_or_drawn_from_torch_s(self):
        layer, _ = make(torch.bfloat16)

        def drawn(manual):
            torch.manual_seed(manual)
            return layer.merged_weight(rounding="stochastic")

        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))
        first, second = drawn(1), layer.merged_weight(rounding="stochastic")
        assert not torch.equal(first, second)
        given = [layer.merged_weight(rounding="stochastic", seed=seed) for seed in (3, 3, 2**63 - 1)]
        assert torch.equal(given[0], given[1])
        assert not torch.equal(given[0], given[2])
        state = torch.get_rng_state()
        layer.merged_weight()
        layer.merged_weight(rounding="stochastic", seed=3)
        assert torch.equal(torch.get_rng_state(), state)

    def test_merge_and_unmerge(self):
        layer, base = make(torch.bfloat16)
        weight, before = base.weight, base.weight.detach().clone()
        expected = layer.merged_weight(rounding="stochastic", seed=3)
        layer.merge(rounding="stochastic", seed=3)
        assert torch.equal(layer.weight, expected)
        layer.unmerge()
        assert layer.weight is weight
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    def test_beyond_the_largest_bf16_it_is_the_nearest(self, rounding):
        largest = torch.finfo(torch.bfloat16).max
        layer, _ = make(torch.bfloat16, activation="identity", orientation="in", scaling=1.0)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.fill_(0.0 if "neat" in name else largest)
            # H = W·Aᵀ is the largest number times A, and ΔW that of them.
            layer.neat_A[0, 0] = 2.0**-64
            layer.neat_B[:, 0] = 0.25 * 2.0**-8 * 2.0**64
            assert (layer.merged_weight(rounding=rounding) == largest).all()
            # A whole unit in the last place more, where a quarter rounded down.
            layer.neat_B[:, 0] = 2.0**-8 * 2.0**64
        with pytest.raises(ValueError, match="finite"):
            layer.merged_weight(rounding=rounding)


class TestCheckpoints:
    def test_the_state_dict_holds_the_original_weight(self):
        layer, _ = make()
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        layer.merge()
        for keep_vars in (False, True):
            state = layer.state_dict(keep_vars=keep_vars)
            assert state.keys() == before.keys()
            assert all(torch.equal(state[k], before[k]) for k in state)
        nested = nn.Sequential(layer).state_dict()
        assert torch.equal(nested["0.weight"], before["weight"])

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("nested", [False, True])
    def test_loading_into_a_merged_layer_is_refused_and_changes_nothing(self, nested, assign, strict):
        layer, linear = make(depth=1)
        other, _ = make(depth=1)
        layer.merge()
        model = nn.Sequential(layer) if nested else layer
        before, weight = snapshot(layer), linear.weight
        state = nn.Sequential(other).state_dict() if nested else other.state_dict()
        with pytest.raises(RuntimeError, match="unmerge"):
            model.load_state_dict(copy.deepcopy(state), strict=strict, assign=assign)
        assert unchanged(layer, before)
        assert linear.weight is weight is layer.base_weight

    def test_loading_the_rest_of_a_model_leaves_a_merged_layer_and_its_original_alone(self):
        layer, linear = make()
        layer.merge()
        model = nn.ModuleDict({"adapted": layer, "head": nn.Linear(20, 2)})
        weight, merged = linear.weight, layer.weight
        model.load_state_dict({"head.bias": torch.ones(2)}, strict=False)
        assert layer.weight is merged
        assert linear.weight is weight is layer.base_weight

    def test_a_state_dict_of_a_merged_layer_loads_into_another(self):
        layer, _ = make(activation="gelu")
        other, _ = make(activation="gelu")
        layer.merge()
        other.load_state_dict(layer.state_dict())
        other.merge()
        assert torch.equal(other.weight, layer.weight)


class TestRefusals:
    def test_twice(self):
        layer, _ = make()
        with pytest.raises(RuntimeError, match="expected a merged layer, got an unmerged"):
            layer.unmerge()
        layer.merge()
        weight = layer.weight
        with pytest.raises(RuntimeError, match="expected an unmerged layer, got a merged"):
            layer.merge()
        assert layer.weight is weight

    def test_training_while_merged(self):
        layer, _ = make()
        layer.train().merge()
        x = torch.randn(5, 24)
        with pytest.raises(RuntimeError, match="unmerge"):
            layer(x)
        with torch.no_grad():
            layer(x)
        layer.eval()(x)

    @pytest.mark.parametrize("poison", ["neat_A", "neat_B", "weight"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, value, poison):
        layer, _ = make()
        with torch.no_grad():
            layer.get_parameter(poison)[0, 0] = value
        before = snapshot(layer)
        with pytest.raises(ValueError, match="finite"):
            layer.merge()
        assert not layer.merged
        assert unchanged(layer, before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
    def test_stochastic_rounding_of_another_dtype(self, dtype):
        layer, _ = make(dtype)
        before = snapshot(layer)
        with pytest.raises(ValueError, match=f"expected a torch.bfloat16 weight, got {dtype}"):
            layer.merge(rounding="stochastic", seed=3)
        assert unchanged(layer, before)
        assert not layer.merged

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"rounding": "up"}, ValueError, "rounding must be one of 'nearest', 'stochastic'; got 'up'"),
            ({"seed": 3}, ValueError, "seed is for rounding='stochastic'"),
            ({"rounding": "stochastic", "seed": -1}, ValueError, "seed must be at least 0, got -1"),
            ({"rounding": "stochastic", "seed": 2**63}, ValueError, "seed must be below"),
            ({"rounding": "stochastic", "seed": 1.0}, TypeError, "seed must be an int, got float"),
        ],
        ids=str,
    )
    def test_options_that_are_not_valid(self, options, error, match):
        layer, _ = make(torch.bfloat16)
        model = nn.Sequential(layer)
        before = snapshot(model)
        for call in (layer.merge, layer.merged_weight, lambda **options: nk.merge_neat(model, **options)):
            with pytest.raises(error, match=match):
                call(**options)
        assert unchanged(model, before)

    def test_an_overflow_of_fp16(self):
        layer, _ = make(torch.float16)
        with torch.no_grad():
            layer.weight.fill_(60000.0)
            layer.neat_A.fill_(1.0)
            layer.neat_B.fill_(1.0)
        before = snapshot(layer)
        with pytest.raises(ValueError, match="finite"):
            layer.merge()
        assert unchanged(layer, before)


def make_model(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype)
    nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["0", "2"], activation="gelu"))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.neat_B)
    return model


class TestModel:
    @pytest.mark.parametrize("merged_before", [(), (0,), (0, 2)])
    def test_plain_layers_are_left_that_compute_the_same(self, merged_before):
        model = make_model().eval()
        x = torch.randn(5, 6, dtype=torch.float64)
        expected, originals = model(x).detach(), [model[i]._original for i in (0, 2)]
        for i in merged_before:
            model[i].merge()
        assert nk.merge_neat(model) is model
        assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
        assert [model[i] for i in (0, 2)] == originals
        torch.testing.assert_close(model(x), expected)
        assert not any("neat" in name for name in model.state_dict())
        assert not any(p.requires_grad for p in (*model[0].parameters(), *model[2].parameters()))
        with pytest.raises(ValueError, match="got none"):
            nk.merge_neat(model)
        with pytest.raises(ValueError, match="got none"):
            nk.remove_neat(model)

    @pytest.mark.parametrize("position", [0, 2])
    def test_an_infinite_layer_leaves_the_whole_model_alone(self, position):
        model = make_model()
        with torch.no_grad():
            model[position].neat_B[0, 0] = float("nan")
        before, types = snapshot(model), [type(m) for m in model]
        with pytest.raises(ValueError, match="finite"):
            nk.merge_neat(model)
        assert [type(m) for m in model] == types
        assert unchanged(model, before)
        nk.remove_neat(model)

    @pytest.mark.parametrize("tie", ["embedding", "two adapted layers", "adapted and not"])
    @pytest.mark.parametrize("merged_before", [False, True])
    def test_a_tied_weight_is_refused(self, tie, merged_before):
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "emb": nn.Embedding(6, 6)})
        tied = model["emb"] if tie == "embedding" else model["b"]
        tied.weight = model["a"].weight
        nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["a", "b"] if "two" in tie else ["a"]))
        nn.init.normal_(model["a"].neat_B)
        if merged_before:
            model["a"].merge()
        before, modules = snapshot(model), list(model.modules())
        with pytest.raises(ValueError, match=r"tied to.*expected a weight of its own"):
            nk.merge_neat(model)
        assert unchanged(model, before)
        assert list(model.modules()) == modules

    def test_a_module_under_two_names_is_merged_once(self):
        model = nn.Module()
        model.a = nn.Linear(6, 6, dtype=torch.float64)
        model.b = model.a
        nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["a", "b"]))
        nn.init.normal_(model.a.neat_B)
        expected = model.a.weight + model.a.delta_weight()
        nk.merge_neat(model)
        assert type(model.a) is nn.Linear
        assert model.a is model.b
        torch.testing.assert_close(model.a.weight.detach(), expected)

    def test_stochastic_rounding_takes_a_seed_for_every_layer(self):
        model = make_model(torch.bfloat16)
        for layer, seed in ((model[0], 2**63 - 1), (model[2], 0)):
            layer.merge(rounding="stochastic", seed=seed)
        expected = [model[i].weight.detach().clone() for i in (0, 2)]
        for i in (0, 2):
            model[i].unmerge()
        merged = nk.merge_neat(copy.deepcopy(model), rounding="stochastic", seed=2**63 - 1)
        assert all(torch.equal(merged[i].weight, weight) for i, weight in zip((0, 2), expected, strict=True))
        drawn = []
        for manual in (1, 1, 2):
            torch.manual_seed(manual)
            drawn.append(nk.merge_neat(copy.deepcopy(model), rounding="stochastic"))
        same = [all(torch.equal(drawn[0][i].weight, other[i].weight) for i in (0, 2)) for other in drawn]
        assert same == [True, True, False]

    def test_stochastic_rounding_leaves_a_model_that_it_cannot_round_alone(self):
        model = make_model(torch.bfloat16)
        model[2].merge()
        before, types = snapshot(model), [type(m) for m in model]
        with pytest.raises(ValueError, match="2 is merged: expected an unmerged layer"):
            nk.merge_neat(model, rounding="stochastic")
        model[2].unmerge()
        model[2].float()
        with pytest.raises(ValueError, match=r"2: .*expected a torch\.bfloat16 weight, got torch\.float32"):
            nk.merge_neat(model, rounding="stochastic")
        model[2].bfloat16()
        assert [type(m) for m in model] == types
        assert snapshot(model)[0].keys() == before[0].keys()
        assert not any(model[i].merged for i in (0, 2))

    def test_only_one_more_weight_is_alive_at_a_time(self, monkeypatch):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
        nk.apply_neat(model, nk.NeatConfig(r=2, target_modules="all-linear"))
        originals = [weakref.ref(layer.weight) for layer in model]
        alive, plain_linear = [], nk.FusedNeatLinear.plain_linear

        def watched(layer, weight):
            alive.append(sum(ref() is not None for ref in originals))
            return plain_linear(layer, weight)

        monkeypatch.setattr(nk.FusedNeatLinear, "plain_linear", watched)
        nk.merge_neat(model)
        assert alive == [5, 4, 3, 2, 1]

    def test_a_single_layer_is_no_model(self):
        layer, _ = make()
        for call in (nk.merge_neat, nk.remove_neat):
            with pytest.raises(ValueError, match=r"merge\(\)"):
                call(layer)

    def test_a_layer_made_from_sizes_becomes_a_linear(self):
        for bias in (False, True):
            model = nn.Sequential(nk.FusedNeatLinear(6, 8, bias, r=2, dtype=torch.float64))
            nn.init.normal_(model[0].neat_B)
            x = torch.randn(5, 6, dtype=torch.float64)
            expected = model(x).detach()
            nk.merge_neat(model)
            assert type(model[0]) is nn.Linear
            torch.testing.assert_close(model(x), expected)
