"""A Neat adapter as the LoRA adapter that it is, and LoRA folders on the kernels of the token side."""

import json
import struct
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import neat_kernels as nk
from neat_kernels.vocabulary import ACTIVATIONS
from tests.adapter_problem import HEADS, adapted, agree, base, logits, shake
from tests.models import CASES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANKS = {"q_proj": 6, r"layers\.1\.mlp\.down_proj": 3}


def check_by_peft(model, batch, folder, name, tolerance, dtype=torch.float32):
    """Stock PEFT loads the folder, and its logits agree to tolerance × max|logit|."""
    expected = logits(model, batch)
    peft_model = PeftModel.from_pretrained(base(name).to(dtype), folder)
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(logits(peft_model, batch), expected, rtol=0, atol=atol)
    untrained = logits(base(name).to(dtype), batch)
    assert (expected - untrained).abs().max() > 10 * atol, "the adapter must change more than is tolerated"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("orientation", ["out", "in"])
def test_every_network_on_llama(tmp_path, orientation, activation, depth):
    model, batch = adapted(
        "llama", orientation=orientation, activation=activation, depth=depth, rank_pattern=RANKS, scaling=3.0
    )
    exported = nk.export_lora(model, tmp_path / "lora", batch=batch)
    assert exported.r == 6
    assert exported.max_difference <= 1e-5 * exported.max_logit
    check_by_peft(model, batch, tmp_path / "lora", "llama", 1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("orientation", ["out", "in"])
def test_every_model(tmp_path, name, orientation):
    model, batch = adapted(name, orientation=orientation, activation="sin2pi", scaling=3.0)
    nk.export_lora(model, tmp_path / "lora")
    check_by_peft(model, batch, tmp_path / "lora", name, 1e-5)
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["modules_to_save"] == HEADS.get(name)


def as_large_as_the_weights(model):
    """Scale each update to the norm of its weight: larger ones round more than is tolerated, in PEFT as here."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nk.FusedNeatLinear):
                layer.neat_B.mul_(layer.weight.float().norm() / layer.delta_weight().float().norm())
    return model


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("orientation", ["out", "in"])
def test_every_network_in_bf16(tmp_path, orientation, activation, depth):
    model = base("llama").to(torch.bfloat16)
    options = {"orientation": orientation, "activation": activation, "depth": depth, "rank_pattern": RANKS}
    nk.apply_neat(model, nk.NeatConfig(r=4, target_modules="all-linear", **options))
    _, batch = adapted("llama")
    as_large_as_the_weights(shake(model))
    exported = nk.export_lora(model, tmp_path / "lora", batch=batch)
    assert exported.max_difference <= 2e-2 * exported.max_logit
    check_by_peft(model, batch, tmp_path / "lora", "llama", 2e-2, torch.bfloat16)


@pytest.mark.parametrize(("pad_to", "r"), [(None, 6), (6, 6), (20, 20), ("vllm", 8)])
def test_ranks_are_padded_with_zeros(tmp_path, pad_to, r):
    model, batch = adapted("llama", rank_pattern={"q_proj": 6})
    exported = nk.export_lora(model, tmp_path / "lora", pad_to=pad_to)
    assert exported.r == r
    for name, tensor in load_file(tmp_path / "lora" / WEIGHTS).items():
        own = 6 if "q_proj" in name else 4
        rest = tensor[own:] if "lora_A" in name else tensor[:, own:]
        assert tensor.shape[0 if "lora_A" in name else 1] == r
        assert torch.equal(rest, torch.zeros_like(rest))
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (r, r, "none")
    check_by_peft(model, batch, tmp_path / "lora", "llama", 1e-5)


@pytest.mark.parametrize(("r", "padded"), [(1, 1), (2, 8), (65, 128), (257, 320), (512, 512)])
def test_ranks_that_vllm_takes(tmp_path, r, padded):
    assert nk.export_lora(adapted("llama", r=r)[0], tmp_path / "lora", pad_to="vllm").r == padded


def test_the_report_tells_a_wrong_export(tmp_path, monkeypatch):
    model, batch = adapted("llama", scaling=3.0)
    factors = nk.FusedNeatLinear.lora_factors
    monkeypatch.setattr(nk.FusedNeatLinear, "lora_factors", lambda self: (factors(self)[0], 1.01 * factors(self)[1]))
    exported = nk.export_lora(model, tmp_path / "lora", batch=batch)
    assert exported.max_difference > 1e-4 * exported.max_logit
    assert "logits differ by at most" in str(exported)


def test_the_comparison_leaves_the_model_alone(tmp_path):
    model, batch = adapted("roberta")
    model.train()
    model.classifier.eval()
    modes = [m.training for m in model.modules()]
    nk.export_lora(model, tmp_path / "a", batch=batch)
    assert [m.training for m in model.modules()] == modes
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="input_ids"):
        nk.export_lora(model, tmp_path / "b", batch={"nothing": 3})
    assert [m.training for m in model.modules()] == modes
    assert not any("forward" in vars(m) for m in model.modules())
    assert not (tmp_path / "b").exists()


def test_a_merged_model_exports_the_same(tmp_path):
    model, _ = adapted("llama")
    nk.export_lora(model, tmp_path / "a")
    for layer in model.modules():
        if isinstance(layer, nk.FusedNeatLinear):
            layer.merge()
    nk.export_lora(model, tmp_path / "b")
    ours, merged = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert all(torch.equal(merged[name], value) for name, value in ours.items())


def tied(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = nk.apply_neat(LlamaForCausalLM(config), nk.NeatConfig(r=2, target_modules=["q_proj"], **options))
    return shake(model)


def test_a_tied_head_that_is_not_trained_is_no_obstacle(tmp_path):
    nk.export_lora(tied(), tmp_path / "lora")


def with_a_trained_bias():
    model, _ = adapted("roberta")
    model.roberta.encoder.layer[0].attention.self.query.bias.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (with_a_trained_bias, {}, r"all that is trained, got roberta\.encoder\.layer\.0\.attention\.self\.query\.bias"),
        (lambda: tied(modules_to_save=["lm_head"]), {}, "lm_head, which shares a parameter"),
        (lambda: adapted("roberta")[0], {"pad_to": "vllm"}, "which vLLM does not load; got classifier"),
        (lambda: adapted("llama", r=513)[0], {"pad_to": "vllm"}, "expected ranks up to 512, got 513"),
        (lambda: adapted("llama", r=9)[0], {"pad_to": 8}, r"expected at least the rank of .*, 9; got 8"),
        (lambda: adapted("llama")[0], {"pad_to": "tgi"}, "expected a rank, 'vllm' or None, got 'tgi'"),
        (lambda: base("llama"), {}, "got none"),
    ],
    ids=["bias", "tied", "vllm modules", "vllm rank", "rank", "word", "plain"],
)
def test_what_lora_cannot_hold_is_refused(tmp_path, make, options, match):
    with pytest.raises(nk.AdapterError, match=match):
        nk.export_lora(make(), tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def stock(name, folder, **options):
    """A folder that stock PEFT saved, what its model computes, and a batch."""
    _, batch = adapted(name)
    options = {"r": 4, "lora_alpha": 12, "target_modules": CASES[name].target_modules, **options}
    peft_model = shake(get_peft_model(base(name), LoraConfig(init_lora_weights=False, **options)))
    peft_model.save_pretrained(folder)
    return logits(peft_model, batch), batch


@pytest.mark.parametrize("name", CASES)
def test_lora_of_peft_runs_here(tmp_path, name):
    expected, batch = stock(name, tmp_path / "lora", modules_to_save=HEADS.get(name))
    model = nk.from_lora(tmp_path / "lora", base(name))
    assert sum(isinstance(m, nk.FusedLoraLinear) for m in model.modules()) >= 2
    agree(logits(model, batch), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {r"layers\.0\..*v_proj": 3}},
        {"lora_dropout": 0.5},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"lora_alpha": 2.5},
    ],
    ids=["rslora", "patterns", "dropout", "regex", "alpha"],
)
def test_options_of_lora(tmp_path, options):
    expected, batch = stock("llama", tmp_path / "lora", **options)
    model = nk.from_lora(tmp_path / "lora", base("llama"))
    agree(logits(model, batch), expected)
    dropout = {m.dropout for m in model.modules() if isinstance(m, nk.FusedLoraLinear)}
    assert dropout == {options.get("lora_dropout", 0.0)}


def test_lora_trains_as_in_peft(tmp_path):
    _, batch = stock("llama", tmp_path / "lora")
    ours = nk.from_lora(tmp_path / "lora", base("llama")).train()
    theirs = PeftModel.from_pretrained(base("llama"), tmp_path / "lora", is_trainable=True).train()
    ours(**batch).loss.backward()
    theirs(**batch).loss.backward()
    named = dict(theirs.named_parameters())
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 12
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, named[f"base_model.model.{name}.default.weight"].grad, rtol=1e-4, atol=1e-7)


def test_lora_goes_out_as_it_came_in(tmp_path):
    expected, batch = stock("gpt2", tmp_path / "lora")
    model = nk.from_lora(tmp_path / "lora", base("gpt2"))
    exported = nk.export_lora(model, tmp_path / "again", batch=batch)
    assert exported.max_difference <= 1e-5 * exported.max_logit
    peft_model = PeftModel.from_pretrained(base("gpt2"), tmp_path / "again")
    agree(logits(peft_model, batch), expected)
    with pytest.raises(nk.AdapterError, match=r"export_lora\(\) saves those"):
        nk.save_adapter(model, tmp_path / "neat")
    with pytest.raises(nk.AdapterError, match="has a LoRA layer"):
        nk.save_adapter(adapted("gpt2")[0], tmp_path / "neat")
        nk.load_adapter(model, tmp_path / "neat")


def test_the_base_model_is_found_by_its_name(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    expected, batch = stock("llama", tmp_path / "lora", task_type="CAUSAL_LM")
    with pytest.raises(nk.AdapterError, match="expected a base model"):
        nk.from_lora(tmp_path / "lora")
    path = tmp_path / "lora" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    agree(logits(nk.from_lora(tmp_path / "lora"), batch), expected)


def test_an_exported_adapter_knows_its_base(tmp_path):
    nk.export_lora(adapted("llama")[0], tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", nk.BaseMismatchWarning)
        nk.from_lora(tmp_path / "lora", base("llama"))
    with pytest.warns(nk.BaseMismatchWarning, match="other base weights"):
        nk.from_lora(tmp_path / "lora", shake(base("llama").requires_grad_(True)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "got use_dora"),
        ({"lora_bias": True}, "got lora_bias"),
        ({"layer_replication": [[0, 1]]}, "got layer_replication"),
        ({"megatron_core": "other"}, "got megatron_core"),
        ({"bias": "all"}, "expected bias 'none', got 'all'"),
        ({"init_lora_weights": "pissa"}, "leaves the base weight as it is, got 'pissa'"),
        ({"peft_type": "PEANUT"}, "expected peft_type LORA, got 'PEANUT'"),
        ({"r": 0}, "r must be an int of at least 1, got 0"),
        ({"r": 5}, r"lora_A.weight of shape \[4, 32\] instead of \[5, 32\]"),
        ({"lora_alpha": "x"}, "adapter_config.json"),
        ({"lora_alpha": float("inf")}, "scaling must be finite"),
        ({"lora_alpha": 10**400}, "adapter_config.json"),
        ({"rank_pattern": {"(": 2}}, "adapter_config.json"),
        ({"lora_dropout": 2}, "dropout must be in"),
    ],
)
def test_lora_folders_that_are_refused(tmp_path, changes, match):
    stock("llama", tmp_path / "lora")
    path = tmp_path / "lora" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = base("llama")
    before = str(model)
    with pytest.raises(nk.AdapterError, match=match):
        nk.from_lora(tmp_path / "lora", model)
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_lora_file_with_a_tensor_that_nothing_reads(tmp_path):
    stock("llama", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name).replace("lora_A.weight", "lora_magnitude_vector")
    save_file({**tensors, name: torch.ones(32)}, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(nk.AdapterError, match="lora_magnitude_vector, which the adapter does not have"):
        nk.from_lora(tmp_path / "lora", base("llama"))


def broken(tensors, content):
    """Files of weights that are wrong, by what is said of them."""
    first = next(name for name in tensors if "lora_A" in name)
    nan = torch.full_like(tensors[first], torch.nan)
    changed = {
        "expected finite values": {**tensors, first: nan},
        "lora_B.weight": {name: value for name, value in tensors.items() if "lora_B" not in name},
        "for which there are no tensors": {name: value for name, value in tensors.items() if name != first},
        "which it does not have": {**tensors, first.replace("model.layers.0", "model/../.."): tensors[first].clone()},
        "expected keys that begin with": {**tensors, "elsewhere": torch.zeros(2)},
        "convertible to torch.float32, got torch.int32": {**tensors, first: tensors[first].int()},
    }
    yield from ((match, save(value)) for match, value in changed.items())
    for bad in (content[:100], content[:-1], b"", struct.pack("<Q", 10**9) + content[8:]):
        yield "expected a whole safetensors file, got another", bad


def test_lora_weights_that_are_refused(tmp_path):
    stock("llama", tmp_path / "lora")
    path, model = tmp_path / "lora" / WEIGHTS, base("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for match, content in broken(load_file(path), path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(nk.AdapterError, match=match):
            nk.from_lora(tmp_path / "lora", model)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    path.unlink()
    with pytest.raises(nk.AdapterError, match=f"expected a file {WEIGHTS}, got none"):
        nk.from_lora(tmp_path / "lora", model)


def test_an_adapted_model_takes_no_lora(tmp_path):
    stock("llama", tmp_path / "lora")
    with pytest.raises(nk.AdapterError, match="expected a model without adapters"):
        nk.from_lora(tmp_path / "lora", adapted("llama")[0])


def test_the_layer_by_itself():
    linear = nn.Linear(6, 5).to(torch.bfloat16)
    layer = nk.FusedLoraLinear(linear, r=3, scaling=2.0, dropout=0.5)
    x = torch.randn(2, 4, 6, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x)), "a fresh layer changes nothing"
    assert layer.lora_A.dtype == torch.float32
    assert not linear.weight.requires_grad
    assert "in_features=6, out_features=5, bias=True, r=3, scaling=2.0, dropout=0.5" in repr(layer)
    with pytest.raises(TypeError, match=r"expected nn\.Linear or transformers' Conv1D, got Embedding"):
        nk.FusedLoraLinear(nn.Embedding(3, 4), r=2)
    with pytest.raises(ValueError, match="r must be at least 1"):
        nk.FusedLoraLinear(linear, r=0)
