"""Merging W + ΔW and taking it apart again, of one layer and of a model."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import neat_kernels as nk
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

    def test_an_infinite_layer_leaves_the_whole_model_alone(self):
        model = make_model()
        with torch.no_grad():
            model[2].neat_B[0, 0] = float("nan")
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
