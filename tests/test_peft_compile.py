"""Layers under PEFT that torch.compile traces whole, and that accelerate has spread over devices."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeanutConfig, get_peft_model
from torch import nn

from neat_kernels.integrations.peft import NeatConfig, accelerate

CONFIGS = {
    "peanut": PeanutConfig(r=4, depth=1, act_fn="silu", target_modules=["0", "2"], init_weights=False),
    "lora": LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False),
    "neat": NeatConfig(r=4, orientation="in", activation="sin2pi", target_modules=["0", "2"], init_weights=False),
}


def adapted(kind):
    model = get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)), CONFIGS[kind])
    if kind != "neat":
        accelerate(model)
    return model


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_compiles_in_one_graph(kind):
    model, x = adapted(kind), torch.randn(5, 12)
    y, gradients = step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y_compiled, gradients_compiled = step(compiled, x)
    assert torch.equal(y_compiled, y)
    for name, gradient in gradients_compiled.items():
        assert torch.equal(gradient, gradients[name.removeprefix("_orig_mod.")]), name
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_runs_where_accelerate_has_placed_every_module(kind):
    model, x = adapted(kind), torch.randn(5, 12)
    y, gradients = step(model, x)
    for module in [m for m in model.modules() if not list(m.children())]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    layer = model.base_model.model[0]
    assert "the base layer is called (hooks hang on it)" in layer.explain(x)
    y_placed, gradients_placed = step(model, x)
    assert (y_placed - y).abs().max() <= 1e-6
    for name, gradient in gradients.items():
        assert (gradients_placed[name] - gradient).norm() <= 1e-5 * gradient.norm()


def test_an_adapter_that_accelerate_offloads_is_not_fused():
    model, x = adapted("peanut"), torch.randn(5, 12)
    layer = model.base_model.model[0]
    y = layer(x)
    add_hook_to_module(layer.peanut_B["default"], AlignDevicesHook(execution_device="cpu", offload=False))
    assert "backend=" in layer.explain(x)
    layer.peanut_B["default"]._hf_hook.offload = True
    assert "PEFT's own forward: adapter 'default': hooks hang on a part of it" in layer.explain(x)
    layer.peanut_B["default"]._hf_hook.offload = False
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["peanut", "lora"])
def test_a_sharded_adapter_keeps_pefts_forward(kind):
    model, x = adapted(kind), torch.randn(5, 12)
    layer = model.base_model.model[0]
    part = layer.peanut_B["default"] if kind == "peanut" else layer.lora_B["default"]

    class DTensor(nn.Parameter):
        pass

    y = layer(x)
    part.weight = DTensor(part.weight.detach())
    assert "PEFT's own forward: adapter 'default': a part of it is sharded" in layer.explain(x)
    assert (layer(x) - y).abs().max() <= 1e-5
