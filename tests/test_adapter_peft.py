"""Folders of type PEANUT, both ways between this package and stock PEFT."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeanutConfig, PeftModel, TaskType, get_peft_model
from torch import nn

import neat_kernels as nk
from tests.adapter_problem import HEADS, adapted, agree, base, logits, shake
from tests.models import CASES

# PEFT's PEANUT takes nn.Linear alone.
NAMES = [name for name in CASES if name != "gpt2"]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_what_is_saved(tmp_path, name, depth):
    model, batch = adapted(name, depth=depth, activation="gelu_tanh" if depth else "relu")
    assert nk.save_adapter(model, tmp_path / "adapter").peft_type == "PEANUT"
    peft_model = PeftModel.from_pretrained(base(name), tmp_path / "adapter")
    expected = logits(model, batch)
    assert (expected - logits(base(name), batch)).abs().max() > 1e-3
    agree(logits(peft_model, batch), expected)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saved_is_loaded(tmp_path, name, depth):
    _, batch = adapted(name)
    config = PeanutConfig(
        r=4, depth=depth, act_fn="gelu_new" if depth else "relu", scaling=0.5,
        target_modules=CASES[name].target_modules, modules_to_save=HEADS.get(name), init_weights=False,
    )  # fmt: skip
    peft_model = shake(get_peft_model(base(name), config))
    expected = logits(peft_model, batch)
    peft_model.save_pretrained(tmp_path / "adapter")
    model = nk.load_adapter(base(name), tmp_path / "adapter")
    agree(logits(model, batch), expected)
    for module in model.modules():
        if isinstance(module, nk.FusedNeatLinear):
            assert (module.depth, module.scaling) == (depth, 0.5)


@pytest.mark.parametrize(
    ("act_fn", "activation"),
    [
        ("relu", "relu"), ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("gelu_python_tanh", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"), ("silu", "silu"), ("swish", "silu"), ("tanh", "tanh"),
        ("sigmoid", "sigmoid"), ("linear", "identity"),
    ],
)  # fmt: skip
def test_names_of_activations(tmp_path, act_fn, activation):
    _, batch = adapted("llama")
    config = PeanutConfig(r=4, act_fn=act_fn, target_modules=["q_proj", "up_proj"], init_weights=False)
    peft_model = shake(get_peft_model(base("llama"), config))
    peft_model.save_pretrained(tmp_path / "stock")
    model = nk.load_adapter(base("llama"), tmp_path / "stock")
    assert {m.activation for m in model.modules() if isinstance(m, nk.FusedNeatLinear)} == {activation}
    agree(logits(model, batch), logits(peft_model, batch))
    nk.save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(base("llama"), tmp_path / "ours")
    agree(logits(again, batch), logits(peft_model, batch))


def test_an_activation_that_has_no_kernel_is_refused(tmp_path):
    config = PeanutConfig(r=4, act_fn="mish", target_modules=["q_proj"])
    get_peft_model(base("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(nk.AdapterError, match=r"act_fn must be one of relu, .*; got 'mish'"):
        nk.load_adapter(base("llama"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=["regex", "layers", "exclude", "all-linear"],
)
def test_every_way_that_peft_names_layers(tmp_path, selection):
    _, batch = adapted("llama")
    peft_model = shake(get_peft_model(base("llama"), PeanutConfig(r=4, **selection)))
    peft_model.save_pretrained(tmp_path / "adapter")
    model = nk.load_adapter(base("llama"), tmp_path / "adapter")
    agree(logits(model, batch), logits(peft_model, batch))


def test_a_task_and_a_second_adapter_of_peft(tmp_path):
    _, batch = adapted("roberta")
    config = PeanutConfig(r=4, target_modules=["query"], task_type=TaskType.SEQ_CLS)
    peft_model = get_peft_model(base("roberta"), config)
    peft_model.add_adapter("other", PeanutConfig(r=2, target_modules=["key"], task_type=TaskType.SEQ_CLS))
    shake(peft_model)
    peft_model.set_adapter("other")
    peft_model.save_pretrained(tmp_path / "both")
    model = nk.load_adapter(base("roberta"), tmp_path / "both" / "other")
    agree(logits(model, batch), logits(peft_model, batch))


def test_auto_peft_finds_the_base(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    shake(nk.apply_neat(model, nk.NeatConfig(r=4, target_modules=["q_proj"])))
    nk.save_adapter(model, tmp_path / "adapter")
    _, batch = adapted("llama")
    peft_model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    agree(logits(peft_model, batch), logits(model, batch))


def test_a_classifier_says_its_task_only_with_its_head(tmp_path):
    for heads, task in ((["classifier"], "SEQ_CLS"), (None, None)):
        model, batch = adapted("roberta", modules_to_save=heads)
        nk.save_adapter(model, tmp_path / str(task))
        assert json.loads((tmp_path / str(task) / "adapter_config.json").read_text())["task_type"] == task
        peft_model = PeftModel.from_pretrained(base("roberta"), tmp_path / str(task))
        agree(logits(peft_model, batch), logits(model, batch))


def test_peft_refuses_a_folder_of_type_neat(tmp_path):
    """In a process of its own: neat_kernels.integrations.peft, which another test imports, makes PEFT know the type."""
    nk.save_adapter(adapted("llama", activation="sin2pi")[0], tmp_path / "adapter")
    code = f"""
from peft import PeftModel
from tests.adapter_problem import base
PeftModel.from_pretrained(base("llama"), {str(tmp_path / "adapter")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NEAT" in done.stderr.splitlines()[-1]


def test_a_head_whose_name_ends_another_name_is_not_left_to_peft(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head, self.subhead = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x)) + self.subhead(x)

    model = shake(nk.apply_neat(Two(), nk.NeatConfig(r=2, target_modules=["body"], modules_to_save=["head"])))
    saved = nk.save_adapter(model, tmp_path / "adapter")
    assert saved.peft_type == "NEAT"
    assert "would take subhead for too" in saved.reasons[0]
    x = torch.randn(3, 4)
    assert torch.equal(nk.load_adapter(Two(), tmp_path / "adapter")(x), model(x))
