"""save_adapter and load_adapter: round trips, on every kind of model."""

import copy
import json
import os
import stat
import sys
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

import neat_kernels as nk
from neat_kernels.adapters.fingerprint import fingerprint
from neat_kernels.adapters.names import naming
from tests.adapter_problem import adapted, agree, base, logits, shake
from tests.models import CASES

NETWORKS = [("out", "relu", 0), ("out", "gelu_tanh", 2), ("in", "sin2pi", 1), ("in", "tanh", 0)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("orientation", "activation", "depth"), NETWORKS)
def test_round_trip(tmp_path, name, orientation, activation, depth):
    model, batch = adapted(name, orientation=orientation, activation=activation, depth=depth)
    saved = nk.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", nk.BaseMismatchWarning)
        loaded = nk.load_adapter(base(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not torch.equal(logits(base(name), batch), logits(model, batch))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trained
    assert saved.peft_type == ("PEANUT" if orientation == "out" and name != "gpt2" else "NEAT")
    assert bool(saved.reasons) == (saved.peft_type == "NEAT")


def test_everything_a_layer_can_be_comes_back(tmp_path):
    model = base("llama")
    nk.apply_neat(
        model,
        nk.NeatConfig(
            r=4, target_modules=["q_proj", "k_proj"], rank_pattern={"0.self_attn.q_proj": 7}, dropout=0.25,
            compute_dtype=torch.float32,
        ),
    )  # fmt: skip
    nk.apply_neat(
        model,
        nk.NeatConfig(r=3, target_modules=["mlp.up_proj"], orientation="in", depth=1, activation="sin", scaling=2.0),
    )
    shake(model)
    nk.save_adapter(model, tmp_path / "adapter")
    loaded = nk.load_adapter(base("llama"), tmp_path / "adapter")
    for (name, ours), (other, theirs) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        assert name == other
        assert ours.extra_repr() == theirs.extra_repr()
        if isinstance(ours, nk.FusedNeatLinear):
            assert ours.compute_dtype == theirs.compute_dtype
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_trained_biases_and_other_parameters_come_back(tmp_path):
    model, batch = adapted("roberta")
    layer = model.roberta.encoder.layer[0].attention.self.query
    for p in (layer.bias, model.roberta.embeddings.LayerNorm.weight):
        p.requires_grad_(True)
    shake(model)
    saved = nk.save_adapter(model, tmp_path / "adapter")
    assert any("trained parameters" in reason for reason in saved.reasons)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nk.BaseMismatchWarning)
        loaded = nk.load_adapter(base("roberta"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.roberta.encoder.layer[0].attention.self.query.bias.requires_grad
    assert loaded.roberta.embeddings.LayerNorm.weight.requires_grad
    assert not loaded.roberta.embeddings.LayerNorm.bias.requires_grad


def test_a_head_that_was_frozen_after_training_is_saved(tmp_path):
    model, batch = adapted("roberta")
    model.requires_grad_(False)
    nk.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(nk.load_adapter(base("roberta"), tmp_path / "adapter"), batch), logits(model, batch))


def test_buffers_of_a_module_that_is_trained_whole_come_back(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    model = nk.apply_neat(make(), nk.NeatConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    shake(model)
    for _ in range(3):
        model(torch.randn(16, 6))
    nk.save_adapter(model, tmp_path / "adapter")
    loaded = nk.load_adapter(make(), tmp_path / "adapter")
    x = torch.randn(5, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert loaded[1].num_batches_tracked == 3


def test_a_merged_model_saves_its_adapter(tmp_path):
    model, batch = adapted("llama")
    expected = logits(model, batch)
    for layer in model.modules():
        if isinstance(layer, nk.FusedNeatLinear):
            layer.merge()
    nk.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), expected)
    with pytest.raises(nk.AdapterError, match="is merged: call unmerge"):
        nk.load_adapter(model, tmp_path / "adapter")


def test_loading_into_an_adapted_model_replaces_the_values(tmp_path):
    model, batch = adapted("llama")
    nk.save_adapter(model, tmp_path / "adapter")
    other = shake(copy.deepcopy(model))
    logits(other, batch)  # fills the feature caches
    assert torch.equal(logits(nk.load_adapter(other, tmp_path / "adapter"), batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(tmp_path, dtype):
    model = nk.apply_neat(base("llama").to(dtype), nk.NeatConfig(r=4, target_modules=["q_proj"]))
    shake(model)
    nk.save_adapter(model, tmp_path / "adapter")
    loaded = nk.load_adapter(base("llama").to(dtype), tmp_path / "adapter")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype


def test_wrappers_leave_the_names_alone(tmp_path):
    model, batch = adapted("llama")
    expected = logits(model, batch)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    nk.save_adapter(nn.DataParallel(model), tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any("_orig_mod" in key or "module." in key.replace("base_model.model.", "") for key in file.keys())  # noqa: SIM118
    wrapped = base("llama")
    wrapped.model.layers[1] = torch.compile(wrapped.model.layers[1], backend="eager")
    nk.load_adapter(wrapped, tmp_path / "adapter")
    wrapped.model.layers[1] = wrapped.model.layers[1]._orig_mod
    assert torch.equal(logits(wrapped, batch), expected)


def test_a_layer_under_two_names(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = shake(nk.apply_neat(Twice(), nk.NeatConfig(r=2, target_modules=["first"])))
    assert model.first is model.second
    saved = nk.save_adapter(model, tmp_path / "adapter")
    assert saved.reasons == ("a layer that the model uses under several names",)
    loaded = nk.load_adapter(Twice(), tmp_path / "adapter")
    assert loaded.first is loaded.second
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))


def test_tied_embeddings_that_are_trained_stay_tied(tmp_path):
    options = {"tie_word_embeddings": True}

    def make():
        from tests.models import llama

        torch.manual_seed(0)
        return llama(**options).eval()

    _, batch = adapted("llama")
    model = shake(nk.apply_neat(make(), nk.NeatConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    saved = nk.save_adapter(model, tmp_path / "adapter")
    assert "shares a parameter" in saved.reasons[0]
    loaded = nk.load_adapter(make(), tmp_path / "adapter")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, batch), logits(model, batch))


# Models whose output layer is an embedding too, and its name.
TIED = [("gpt2", "lm_head"), ("t5", "lm_head"), ("t5", "shared"), ("whisper", "proj_out")]


@pytest.mark.parametrize(("name", "head"), TIED)
def test_a_tied_layer_that_is_trained_whole_stays_tied(tmp_path, name, head):
    model, batch = adapted(name, modules_to_save=[head])
    assert any("shares a parameter" in reason for reason in nk.save_adapter(model, tmp_path / "adapter").reasons)
    loaded = nk.load_adapter(base(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not torch.equal(loaded.get_output_embeddings().weight, base(name).get_output_embeddings().weight)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with pytest.raises(nk.AdapterError, match="shares a parameter"):
        nk.export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize(("name", "head"), [case for case in TIED if case[1] != "shared"])
def test_a_tied_output_layer_that_is_adapted(tmp_path, name, head):
    model, batch = adapted(name, target_modules=[head], depth=1)
    assert nk.save_adapter(model, tmp_path / "adapter").peft_type == "PEANUT"
    expected = logits(model, batch)
    assert not torch.equal(expected, logits(base(name), batch))
    loaded = nk.load_adapter(base(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    agree(logits(PeftModel.from_pretrained(base(name), tmp_path / "adapter"), batch), expected)
    nk.export_lora(model, tmp_path / "lora")
    agree(logits(PeftModel.from_pretrained(base(name), tmp_path / "lora"), batch), expected)


def test_another_base_warns_and_names_the_layer(tmp_path):
    model, _ = adapted("llama")
    nk.save_adapter(model, tmp_path / "adapter")
    other = base("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-3
    with pytest.warns(nk.BaseMismatchWarning, match=r"those of model\.layers\.1\.self_attn\.v_proj;"):
        nk.load_adapter(other, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nk.load_adapter(base("llama").to(torch.bfloat16), tmp_path / "adapter", check_base=False)


def test_the_hash_is_of_values():
    W = torch.randn(70, 50).to(torch.bfloat16)
    same = fingerprint(W)
    assert same == fingerprint(W.float()) == fingerprint(W.t().contiguous().t(), None)
    changed = W.clone()
    changed[69, 49] += 1
    others = [changed, W[:-1], W.t(), W.reshape(50, 70), -W]
    assert len({same, fingerprint(W, W[0]), *map(fingerprint, others)}) == 7


def test_the_hash_reads_every_block(monkeypatch):
    W = torch.randn(70, 50)
    whole = fingerprint(W)
    monkeypatch.setattr("neat_kernels.adapters.fingerprint._BLOCK_BYTES", 3 * 50 * 4)
    assert fingerprint(W) == whole


def test_a_warning_about_many_layers_is_short(tmp_path):
    model, _ = adapted("llama", target_modules="all-linear")
    nk.save_adapter(model, tmp_path / "adapter")
    with pytest.warns(nk.BaseMismatchWarning, match=" and 4 more;"):
        nk.load_adapter(shake(base("llama")), tmp_path / "adapter")


def test_target_modules_are_short_where_that_says_all(tmp_path):
    nk.save_adapter(adapted("llama")[0], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("chosen", "every", "expected"),
    [
        (["a.q", "b.q"], ["a", "a.q", "b", "b.q", "b.k"], ["q"]),
        (["a.q"], ["a", "a.q", "b", "b.q"], ["a.q"]),
        (["a.q"], ["a", "a.q", "b", "b.a", "b.a.q"], r"a\.q"),
    ],
    ids=["suffix", "full name", "regex"],
)
def test_names_mean_exactly_the_chosen_modules(chosen, every, expected):
    assert naming(chosen, every) == expected


def test_the_folder_is_readable_by_others_as_umask_says(tmp_path):
    if sys.platform == "win32":
        pytest.skip("no modes")
    nk.save_adapter(adapted("llama")[0], tmp_path / "deep" / "adapter")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "deep" / "adapter").stat().st_mode) == 0o777 & ~umask
    assert sorted(os.listdir(tmp_path / "deep")) == ["adapter"]


def test_the_model_card_says_how_to_load(tmp_path):
    model, _ = adapted("llama", orientation="in")
    model.config._name_or_path = "some/model"
    nk.save_adapter(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: some/model" in card
    assert 'nk.load_adapter(LlamaForCausalLM.from_pretrained("some/model"), "this folder")' in card
    assert "PEFT cannot express this adapter: orientation 'in'" in card
    assert "PeftModel" not in card


def test_str_of_what_was_saved_says_who_loads_it(tmp_path):
    assert "PEANUT, 6 layers, 1,280 parameters; loaded by neat-kernels and by PEFT" in str(
        nk.save_adapter(adapted("llama")[0], tmp_path / "a")
    )
    assert "by neat-kernels alone (activation sin)" in str(
        nk.save_adapter(adapted("llama", activation="sin")[0], tmp_path / "b")
    )
