"""Adapters over quantised bases that run on a CPU: against the dequantised W in float64, merging, memory."""

import copy
import warnings

import pytest
import torch
from masks import assert_masks_follow_the_seed
from peft import PeanutConfig, get_peft_model
from quantised_bases import BASES
from torch import nn

from neat_kernels import reference
from neat_kernels.integrations.peft import NeatConfig, accelerate
from neat_kernels.integrations.peft import bases as bases_module
from neat_kernels.integrations.peft.bases import packed_weight

K, N, TOKENS = 64, 96, 5


class Holder(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.up = base

    def forward(self, x):
        return self.up(x)


def neat_layer(kind, orientation="out", depth=1, dropout=0.0):
    base = BASES[kind].make(nn.Linear(K, N))
    options = {"r": 4, "depth": depth, "activation": "silu", "scaling": 0.8, "orientation": orientation}
    config = NeatConfig(target_modules=["up"], init_weights=False, dropout=dropout, **options)
    model = get_peft_model(Holder(base), config)
    if kind.startswith("torchao"):
        know_quantisation(model, kind)
    return model, model.base_model.model.up, options


def know_quantisation(model, kind):
    """What transformers leaves on a model that it has quantised with torchao."""
    from transformers import TorchAoConfig

    class Quantizer:
        quantization_config = TorchAoConfig(BASES[kind].config())

    layer = model.base_model.model.up
    model.base_model.model.hf_quantizer = Quantizer()
    from neat_kernels.integrations.peft.merging import quantization_of

    layer._neat_quantization = quantization_of(model)


def exact(layer, options, W, x, dy):
    """The branch alone in float64: its part of y, its part of dx, and the gradients of the adapter."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if "neat_" in name}
    x = x.detach().double().requires_grad_()
    chains = [[t for name, t in leaves.items() if chain in name] for chain in ("encoders", "decoders")]
    y = reference.neat_linear(
        x,
        W.double(),
        leaves["neat_A.default.weight"],
        leaves["neat_B.default.weight"],
        encoders=chains[0],
        decoders=chains[1],
        **{name: options[name] for name in ("activation", "scaling", "orientation")},
    )
    branch = y - x @ W.double().t()
    branch.backward(dy.double())
    return branch.detach(), x.grad, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("kind", BASES)
def test_a_step_agrees_with_the_dequantised_weight_in_float64(kind, orientation, depth):
    _, layer, options = neat_layer(kind, orientation, depth)
    W = BASES[kind].weight(layer.base_layer)
    x, dy = torch.randn(TOKENS, K, requires_grad=True), torch.randn(TOKENS, N)
    base = layer.base_layer(x)
    (base_dx,) = torch.autograd.grad(base, x, dy, retain_graph=True)
    y = layer(x)
    y.backward(dy)
    branch, dx, gradients = exact(layer, options, W, x, dy)
    assert (y - base - branch).norm() <= 1e-5 * y.norm()
    assert (x.grad - base_dx - dx).norm() <= 1e-5 * x.grad.norm()
    for name, p in layer.named_parameters():
        if "neat_" in name:
            assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("kind", BASES)
def test_the_dequantised_blocks_are_the_weight(kind, monkeypatch):
    monkeypatch.setattr(bases_module, "BLOCK_BYTES", 4 * K * 40)
    base = BASES[kind].make(nn.Linear(K, N))
    packed = packed_weight(base)
    W, seen = BASES[kind].weight(base), []
    for rows, block in packed.blocks():
        # bitsandbytes' own rounds a product with 1/127 where ours rounds a quotient.
        assert ((block - W[rows]).abs() <= 2.0**-22 * W[rows].abs()).all()
        seen.append(rows.stop - rows.start)
    assert sum(seen) == N
    assert len(seen) == (1 if packed.whole else 3)


@pytest.mark.parametrize("kind", BASES)
def test_nothing_dequantised_is_kept_for_backward(kind):
    _, layer, _ = neat_layer(kind)
    saved = []

    def pack(t):
        saved.append(t.numel() * t.element_size())
        return t

    x = torch.randn(TOKENS, K)  # needs no gradient, so that the base keeps nothing of its own
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum().backward()
    assert max(saved) < N * K


@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("kind", BASES)
def test_the_update_is_that_of_float64(kind, orientation):
    _, layer, options = neat_layer(kind, orientation)
    # The branch of the unit vectors is ΔWᵀ.
    delta, _, _ = exact(layer, options, BASES[kind].weight(layer.base_layer), torch.eye(K), torch.zeros(K, N))
    got = layer.get_delta_weight("default")
    assert (got - delta.t()).norm() <= 1e-5 * delta.norm()


@pytest.mark.parametrize("kind", BASES)
def test_merges_into_the_quantised_weight_and_restores_the_very_tensor(kind):
    model, layer, _ = neat_layer(kind)
    base, x = layer.base_layer, torch.randn(TOKENS, K)
    before, y = base._parameters.get("weight"), layer(x).detach()
    W, delta = BASES[kind].weight(base).clone(), layer.get_delta_weight("default")
    wanted = nn.Linear(K, N)
    wanted.load_state_dict({"weight": (W + delta).float(), "bias": base.bias})
    wanted = BASES[kind].make(wanted)
    model.merge_adapter()
    assert torch.equal(BASES[kind].weight(layer.base_layer), BASES[kind].weight(wanted))
    assert torch.equal(layer.get_delta_weight("default"), delta)
    model.unmerge_adapter()
    assert layer.base_layer is base
    assert base._parameters.get("weight") is before
    assert torch.equal(BASES[kind].weight(base), W)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8"])
def test_a_second_adapter_is_merged_from_the_original_weight(kind):
    model, layer, _ = neat_layer(kind)
    model.add_adapter("other", NeatConfig(r=2, activation="tanh", target_modules=["up"], init_weights=False))
    together = copy.deepcopy(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    together.merge_adapter(["default", "other"])
    merged = BASES[kind].weight(layer.base_layer)
    assert torch.equal(merged, BASES[kind].weight(together.base_model.model.up.base_layer))
    unloaded = model.merge_and_unload()
    assert torch.equal(BASES[kind].weight(unloaded.up), merged)


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8"])
def test_a_merge_that_fails_changes_nothing(kind):
    model, layer, _ = neat_layer(kind)
    model.add_adapter("broken", NeatConfig(r=2, target_modules=["up"]))
    with torch.no_grad():
        layer.neat_B["broken"].weight.fill_(float("nan"))
    model.merge_adapter(["default"])
    merged, weight = BASES[kind].weight(layer.base_layer), layer.base_layer.weight
    with pytest.raises(ValueError, match=r"NaNs detected .* broken"):
        layer.merge(safe_merge=True, adapter_names=["broken"])
    assert layer.merged_adapters == ["default"]
    assert layer.base_layer.weight is weight
    assert torch.equal(BASES[kind].weight(layer.base_layer), merged)


def test_torchao_says_what_it_needs_to_quantise_again():
    _, layer, _ = neat_layer("torchao int8")
    layer._neat_quantization = {}
    weight = layer.base_layer.weight
    with pytest.raises(NotImplementedError, match="a model that transformers quantised"):
        layer.merge()
    assert layer.base_layer.weight is weight
    assert not layer.merged_adapters


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8", "torchao fp8"])
def test_accelerate_is_right_where_stock_peanut_is_wrong_or_raises(kind):
    base = BASES[kind].make(nn.Linear(K, N))
    model = get_peft_model(Holder(base), PeanutConfig(r=4, act_fn="silu", target_modules=["up"], init_weights=False))
    layer, x = model.base_model.model.up, torch.randn(TOKENS, K)
    W = BASES[kind].weight(base).double()
    A, B = (layer.get_submodule(name).weight.double() for name in ("peanut_A.default", "peanut_B.default"))
    delta = (nn.functional.silu(W.t() @ A.t()) @ B.t()).t()
    wanted = base(x) + x.double() @ delta.t()
    if kind == "bnb int8":
        # The codes, up to 127, where the weights are meant: silent.
        assert (layer(x) - wanted).norm() > wanted.norm()
    else:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            layer(x)
    accelerate(model)
    assert (layer(x) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (layer.get_delta_weight("default") - delta).norm() <= 1e-5 * delta.norm()


@pytest.mark.parametrize("kind", BASES)
def test_explain_says_how_the_weight_is_read(kind):
    _, layer, _ = neat_layer(kind)
    read = "dequantised whole" if kind == "HQQ" else "dequantised in row blocks"
    assert read in layer.explain(torch.randn(2, K))


@pytest.mark.parametrize("kind", ["nf4", "bnb int8", "torchao int8"])
def test_a_model_in_eval_mode_reads_the_weight_once(kind):
    model, layer, _ = neat_layer(kind)
    model.eval()
    x = torch.randn(TOKENS, K)
    with torch.no_grad():
        first = model(x)
        factors = layer._neat_cache.factors
        assert torch.equal(model(x), first)
        assert layer._neat_cache.factors is factors
        assert factors is not None
        model.merge_adapter()
        model.unmerge_adapter()
        assert (model(x) - first).abs().max() <= 1e-6 * first.abs().max()


def test_a_copy_of_a_merged_layer_unmerges_by_itself():
    model, layer, _ = neat_layer("nf4")
    x = torch.randn(TOKENS, K)
    y = layer(x)
    model.merge_adapter()
    merged = layer(x)
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert torch.equal(copied(x), y)
    assert torch.equal(layer(x), merged)


def test_dropout_over_a_quantised_base():
    _, layer, _ = neat_layer("nf4", dropout=0.5)
    x = torch.randn(TOKENS, K)
    layer.train()
    assert_masks_follow_the_seed(lambda: layer(x))


def test_a_base_that_is_not_quantised_yet_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="got up"):
        warnings.simplefilter("ignore")
        get_peft_model(Holder(bnb.nn.Linear8bitLt(K, N, device="meta")), NeatConfig(target_modules=["up"]))
