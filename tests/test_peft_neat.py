"""NEAT as a method of PEFT: every option, every way in, every base model, and what it refuses."""

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from masks import assert_masks_follow_the_seed
from models import CASES, make_case
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

import neat_kernels as nk
from neat_kernels import reference
from neat_kernels.integrations.peft import NeatConfig, NeatLinear, accelerate
from neat_kernels.vocabulary import ACTIVATIONS


def adapted(name="llama", **options):
    model, batch = make_case(name)
    options = {"r": 4, "activation": "sin2pi", "init_weights": False, **options}
    targets = options.pop("target_modules", CASES[name].target_modules)
    return get_peft_model(model, NeatConfig(target_modules=targets, **options)), batch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def block(**options):
    options = {"r": 4, "target_modules": ["up", "down"], "init_weights": False, **options}
    return get_peft_model(Block(), NeatConfig(**options))


def largest_difference(model, other, batch):
    with torch.no_grad():
        a, b = model.eval()(**batch).logits, other.eval()(**batch).logits
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_is_the_reference(activation, orientation, depth):
    model = block(activation=activation, orientation=orientation, depth=depth, scaling=0.5).double()
    layer, x = model.base_model.model.up, torch.randn(3, 5, 12, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    chains = {
        kind: [leaves[f"neat_{kind}.default.{i}.weight"] for i in range(depth)] for kind in ("encoders", "decoders")
    }
    base = layer.base_layer
    wanted = reference.neat_linear(
        x,
        base.weight,
        leaves["neat_A.default.weight"],
        leaves["neat_B.default.weight"],
        base.bias,
        **chains,
        orientation=orientation,
        activation=activation,
        scaling=0.5,
    )
    wanted.square().sum().backward()
    assert (y - wanted).norm() <= 1e-12 * wanted.norm()
    for name, p in trained.items():
        assert (p.grad - leaves[name].grad).norm() <= 1e-10 * leaves[name].grad.norm(), name


@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize("name", CASES)
def test_merges_into_every_model(name, orientation):
    tasks = {"roberta": "SEQ_CLS", "llama": "CAUSAL_LM"}
    model, batch = adapted(name, orientation=orientation, depth=1, task_type=tasks.get(name))
    unmerged = copy.deepcopy(model)
    merged = model.merge_and_unload()
    assert not any(
        isinstance(module, (NeatLinear, peft.tuners.tuners_utils.BaseTunerLayer)) for module in merged.modules()
    )
    assert largest_difference(merged, unmerged, batch) < 1e-5


def test_unmerging_restores_the_very_parameter_also_where_it_is_tied():
    model, batch = adapted("gpt2", target_modules=["lm_head"])
    head, embedding = model.base_model.model.lm_head, model.base_model.model.transformer.wte
    weight = head.base_layer.weight
    assert weight is embedding.weight
    before = weight.clone()
    with torch.no_grad():
        logits = model(**batch).logits
        model.merge_adapter()
        assert (model(**batch).logits - logits).abs().max() < 1e-5
    assert torch.equal(embedding.weight, before)  # a merged head must not move the embedding that it was tied to
    model.unmerge_adapter()
    assert head.base_layer.weight is embedding.weight is weight
    assert torch.equal(weight, before)


def test_several_adapters_merge_from_the_original_weight_and_unmerge():
    model = block()
    model.add_adapter(
        "other", NeatConfig(r=2, activation="tanh", orientation="in", target_modules=["up"], init_weights=False)
    )
    layer, x = model.base_model.model.up, torch.randn(5, 12)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    weight = layer.base_layer.weight
    delta = layer.get_delta_weight("other")
    model.merge_adapter(["default"])
    assert torch.equal(layer.get_delta_weight("other"), delta)
    model.merge_adapter(["other"])
    assert (model(x) - both).abs().max() < 1e-5
    model.unmerge_adapter()
    assert layer.base_layer.weight is weight
    assert torch.equal(model(x), both)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(safe_merge):
    model = block()
    layer = model.base_model.model.up
    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.neat_B["default"].weight[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=safe_merge)
    assert layer.base_layer.weight is weight
    assert not layer.merged


@pytest.mark.parametrize("name", ["llama", "roberta", "gpt2", "t5"])
def test_files_go_both_ways_between_peft_and_save_adapter(name, tmp_path):
    patterns = {"rank_pattern": {CASES[name].target_modules[0]: 6}}
    model, batch = adapted(
        name, depth=2, orientation="in", scaling=0.3, dropout=0.1, compute_dtype="float32", **patterns
    )
    model.save_pretrained(tmp_path / "peft")
    base = make_case(name)[0]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert largest_difference(again, model, batch) == 0.0
    ours = nk.load_adapter(copy.deepcopy(base), tmp_path / "peft")
    assert largest_difference(ours, model, batch) == 0.0
    nk.save_adapter(ours, tmp_path / "ours")
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert largest_difference(back, model, batch) == 0.0
    assert back.peft_config["default"].rank_pattern
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["compute_dtype"]) == ("NEAT", "float32")
    assert "backend" not in config


def test_layers_with_options_of_their_own(tmp_path):
    model, batch = make_case("llama")
    base = copy.deepcopy(model)
    nk.apply_neat(model, nk.NeatConfig(r=4, target_modules=["q_proj"], activation="sin"))
    nk.apply_neat(model, nk.NeatConfig(r=3, target_modules=["v_proj"], orientation="in", depth=1))
    for name, parameter in model.named_parameters():
        if "neat_B" in name:
            nn.init.normal_(parameter)
    nk.save_adapter(model, tmp_path / "a")
    again = PeftModel.from_pretrained(base, tmp_path / "a")
    assert largest_difference(again, model, batch) == 0.0
    options = {m.options["default"].orientation for m in again.modules() if isinstance(m, NeatLinear)}
    assert options == {"out", "in"}


def test_the_automodel_class_and_transformers_own_methods(tmp_path):
    base, batch = make_case("llama")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), NeatConfig(r=4, depth=1, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert largest_difference(auto, model, batch) == 0.0
    base.load_adapter(tmp_path / "adapter", adapter_name="mine")
    assert largest_difference(base, model, batch) == 0.0
    base.add_adapter(NeatConfig(r=2, target_modules=["v_proj"]), adapter_name="fresh")
    base.set_adapter("fresh")
    assert base.active_adapters() == ["fresh"]
    base.disable_adapters()
    assert largest_difference(base, make_case("llama")[0], batch) == 0.0


def test_injecting_into_a_module():
    torch.manual_seed(1)
    plain = Block()
    x = torch.randn(3, 12)
    y = plain(x)
    model = inject_adapter_in_model(NeatConfig(r=4, target_modules=["up"]), plain)
    assert isinstance(model.up, NeatLinear)
    assert torch.equal(model(x), y)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "up.neat_A.default.weight",
        "up.neat_B.default.weight",
    }


def test_dropout_acts_in_training_alone():
    model = block(dropout=0.5)
    x = torch.randn(64, 12)
    assert_masks_follow_the_seed(lambda: model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_modules_to_save_and_a_classification_head():
    model, batch = adapted("roberta", task_type="SEQ_CLS")
    assert "classifier" in model.peft_config["default"].modules_to_save
    model(**batch).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("modules_to_save" in name for name in trained)
    assert any("neat_A" in name for name in trained)


def test_copies_and_pickles():
    model = block(depth=1)
    x = torch.randn(3, 12)
    y = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), y)
        with torch.no_grad():
            copied.base_model.model.up.neat_B["default"].weight.zero_()
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_models_get_float32_adapters_as_pefts_other_methods(autocast_adapter_dtype):
    config = NeatConfig(r=4, target_modules=["up"], init_weights=False)
    model = get_peft_model(Block().bfloat16(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for name, p in model.named_parameters() if "neat_" in name}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    # PEFT has made the adapter's parameters anew.
    layer = model.base_model.model.up
    model.eval()
    with torch.no_grad():
        model(x)
    assert layer._neat_cache.factors is not None


def test_a_trained_base_weight_gets_its_gradient():
    # As under FSDP1, whose flat parameter holds what is frozen and what is trained.
    model = block(orientation="in", depth=1, activation="silu").double()
    layer, x = model.base_model.model.up, torch.randn(3, 12, dtype=torch.float64)
    frozen = layer(x).detach()
    layer.base_layer.weight.requires_grad_(True)
    assert "eager torch: its base weight is trained" in layer.explain(x)

    def loss(weight):
        return torch.func.functional_call(layer, {"base_layer.weight": weight}, (x,)).square().sum()

    assert (layer(x) - frozen).abs().max() < 1e-12
    assert torch.autograd.gradcheck(loss, (layer.base_layer.weight.detach().clone().requires_grad_(),))


def test_weighted_sums_and_mixed_batches_are_refused():
    model, batch = adapted("llama")
    model.add_adapter("other", NeatConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="add_weighted_adapter is not defined for NEAT"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.eval()
    with pytest.raises(NotImplementedError, match=r"adapter_names .* is not supported for NEAT"):
        model(**batch, adapter_names=["default"] * 4)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model.generate(batch["input_ids"], adapter_names=["default"] * 4, max_new_tokens=1)


def test_generates():
    model, batch = adapted("llama")
    model.eval()
    tokens = model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(batch["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0), tokens)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.5}, TypeError, "r must be an int, got float"),
        ({"activation": "mish"}, ValueError, "activation must be one of"),
        ({"orientation": "up"}, ValueError, "orientation must be one of"),
        ({"depth": -1}, ValueError, "depth must be at least 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"scaling": float("nan")}, ValueError, "scaling must be finite"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"compute_dtype": "float31"}, ValueError, "the name of a dtype, got 'float31'"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be None or one of"),
        ({"rank_pattern": {"up": 0}}, ValueError, "at least 1, got 0"),
        ({"rank_pattern": {"(": 2}}, ValueError, "must have regexes as keys"),
        ({"layer_options": {"up": {"r": 3}}}, ValueError, "must hold some of orientation"),
        ({"layer_options": {"up": {"depth": -2}}}, ValueError, "depth must be at least 0"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern needs layers_to_transform"),
        ({"init_weights": "pissa"}, TypeError, "init_weights must be True or False"),
        ({"trained_parameters": ["up.bias"]}, ValueError, "must be empty under PEFT"),
    ],
)
def test_refuses_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        NeatConfig(target_modules=["up"], **options)


def test_refuses_options_for_a_layer_that_is_not_there():
    model = Block()
    with pytest.raises(ValueError, match="must name layers of the model in full, got 'upp'"):
        get_peft_model(model, NeatConfig(target_modules=["up"], layer_options={"upp": {"depth": 1}}))
    assert type(model.up) is nn.Linear


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Conv2d(3, 3, 1), "does not support target modules of type .*Conv2d"),
        (nn.Embedding(4, 4), "does not support target modules of type .*Embedding"),
        (nn.Linear(4, 4).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    ],
)
def test_refuses_layers_that_it_cannot_adapt(module, match):
    model = nn.ModuleDict({"layer": module})
    with pytest.raises(NotImplementedError, match=match):
        get_peft_model(model, NeatConfig(target_modules=["layer"]))


def test_refuses_a_projection_that_attention_never_calls():
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention reads its weight and never calls it"):
        get_peft_model(model, NeatConfig(target_modules=["out_proj"]))


def test_refuses_two_explicit_backends_in_one_layer():
    model = block(backend="torch")
    layer = model.base_model.model.up
    with pytest.raises(ValueError, match="must run on one backend, got torch and triton"):
        layer.update_layer("other", nk.options.LayerOptions.of(layer.options["default"], backend="triton"))
    assert "other" not in layer.neat_A
    assert "other" not in layer.options


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils.BaseTuner, "_remove_adapter_name_from_key")
    with pytest.raises(NotImplementedError, match=r"NEAT needs PEFT 0\.21 or newer"):
        NeatConfig(target_modules=["up"])


def test_accelerate_leaves_neat_layers_as_they_are():
    report = accelerate(block())
    assert not report.changed
    assert "it is fused already" in report.unchanged["base_model.model.up"]


def test_a_process_that_has_not_imported_the_package_says_that_it_does_not_know_neat(tmp_path):
    block().save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "NEAT" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", "import neat_kernels.integrations.peft; " + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr


def test_importing_the_package_alone_imports_no_peft():
    code = "import sys, neat_kernels, neat_kernels.integrations; assert 'peft' not in sys.modules"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_importing_without_peft_says_what_is_missing():
    code = "import sys; sys.modules['peft'] = None; import neat_kernels.integrations.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "expected PEFT 0.19 or newer, found none" in done.stderr
