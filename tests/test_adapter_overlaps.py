"""Adapters that meet what another call, another adapter or another name has left."""

import pytest
import torch
from peft import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import neat_kernels as nk
from tests.adapter_problem import shake

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.mid, self.norm, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return self.head(self.norm(self.block(self.mid(torch.relu(self.lin(x))))))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.relu(self.a(self.body(x))))


def neat(model, *targets, **options):
    return shake(nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=list(targets), **options)), 0.3)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_another_adapter_has_trained_is_not_left_beside_this_one(tmp_path):
    nk.save_adapter(neat(Net(), "lin"), tmp_path / "plain")
    with_head = neat(Net(), "lin", modules_to_save=["head"])
    before = {name: value.clone() for name, value in with_head.state_dict().items()}
    with pytest.raises(nk.AdapterError, match="expected modules_to_save that the adapter has too, got 'head'"):
        nk.load_adapter(with_head, tmp_path / "plain")
    assert all(torch.equal(value, before[name]) for name, value in with_head.state_dict().items())
    with_bias = neat(Net(), "lin")
    with_bias.lin.bias.requires_grad_(True)
    with pytest.raises(nk.AdapterError, match=r"expected trained parameters that the adapter has too, got 'lin\.bias'"):
        nk.load_adapter(with_bias, tmp_path / "plain")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["lin"], "modules_to_save": ["block"]}, {"target_modules": ["block.0"]}),
        ({"target_modules": ["lin"]}, {"target_modules": ["mid"], "modules_to_save": ["lin"]}),
        ({"target_modules": ["block.0"]}, {"target_modules": ["mid"], "modules_to_save": ["block"]}),
    ],
    ids=["adapter in a trained module", "trained adapter", "trained module around an adapter"],
)
def test_a_module_is_adapted_or_trained_whole(first, second):
    model = nk.apply_neat(Net(), nk.NeatConfig(r=2, **first))
    before, trained = str(model), trainable(model)
    with pytest.raises(ValueError, match="holds the adapted layer"):
        nk.apply_neat(model, nk.NeatConfig(r=2, **second))
    assert (str(model), trainable(model)) == (before, trained)


def test_a_base_weight_that_trains_is_not_saved(tmp_path):
    model = neat(Net(), "lin")
    model.lin.weight.requires_grad_(True)
    with pytest.raises(nk.AdapterError, match="lin: expected a frozen base weight"):
        nk.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_a_wrapper_forgets_no_module_that_is_trained_whole(tmp_path, wrap):
    wrapped = neat(wrap(Net()), "lin", modules_to_save=["norm"])
    for _ in range(3):
        wrapped(torch.randn(16, 8))
    wrapped.requires_grad_(False)
    assert nk.save_adapter(wrapped, tmp_path / "adapter").peft_type == "PEANUT"
    assert torch.equal(nk.load_adapter(Net(), tmp_path / "adapter").eval()(X), wrapped.eval()(X))


def test_a_trained_module_under_two_names_is_not_left_to_peft(tmp_path):
    model = neat(Twice(), "body", modules_to_save=["a"])
    saved = nk.save_adapter(model, tmp_path / "adapter")
    assert "shares a parameter with another part of the model" in saved.reasons[0]
    assert torch.equal(nk.load_adapter(Twice(), tmp_path / "adapter")(X), model(X))
    with pytest.raises(nk.AdapterError, match="shares a parameter"):
        nk.export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("kind", ["PEANUT", "LORA"])
def test_a_layer_that_peft_adapts_under_one_of_its_names(tmp_path, kind):
    config = PeanutConfig(r=2, target_modules=["a"]) if kind == "PEANUT" else LoraConfig(r=2, target_modules=["a"])
    shake(get_peft_model(Twice(), config)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(nk.AdapterError, match="expected layers with one name each"):
        load = nk.load_adapter if kind == "PEANUT" else lambda model, folder: nk.from_lora(folder, model)
        load(Twice(), tmp_path / "adapter")


def test_two_adapters_for_one_layer(tmp_path):
    nk.save_adapter(neat(Twice(), "a"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{name.replace(".a.", ".b."): 5 * value for name, value in tensors.items()}}, path)
    with pytest.raises(nk.AdapterError, match="expected one adapter for the layer 'b', got another under 'a'"):
        nk.load_adapter(Twice(), tmp_path / "adapter")


def test_a_layer_that_is_compiled_by_itself(tmp_path):
    nk.save_adapter(neat(Net(), "lin"), tmp_path / "adapter")
    model = Net()
    model.lin = torch.compile(model.lin, backend="eager")
    before = str(model)
    with pytest.raises(nk.AdapterError, match="lin: expected a layer that is not compiled by itself"):
        nk.load_adapter(model, tmp_path / "adapter")
    assert str(model) == before


def test_what_the_folder_holds_is_trainable_again(tmp_path):
    nk.save_adapter(neat(Net(), "lin", modules_to_save=["head"]), tmp_path / "adapter")
    model = neat(Net(), "lin", modules_to_save=["head"]).requires_grad_(False)
    nk.load_adapter(model, tmp_path / "adapter")
    assert trainable(model) == {"lin.neat_A", "lin.neat_B", "head.weight", "head.bias"}


def test_a_second_call_freezes_nothing_that_trains_and_everything_else(tmp_path):
    model = Net()
    nk.apply_neat(model.block, nk.NeatConfig(r=2, target_modules=["0"]))
    nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["lin"]))
    ours = {f"{layer}.neat_{which}" for layer in ("block.0", "lin") for which in "AB"}
    assert trainable(model) == ours
    nk.export_lora(neat(Net(), "lin"), tmp_path / "lora")
    mixed = nk.apply_neat(nk.from_lora(tmp_path / "lora", Net()), nk.NeatConfig(r=2, target_modules=["mid"]))
    assert trainable(mixed) == {"lin.lora_A", "lin.lora_B", "mid.neat_A", "mid.neat_B"}


def test_parameters_that_cannot_train_are_no_obstacle():
    model = Net()
    model.norm.counts = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    assert {"norm.weight", "norm.bias"} <= trainable(model)
    assert not model.norm.counts.requires_grad


def test_nested_modules_are_not_left_to_peft(tmp_path):
    model = neat(Net(), "lin", modules_to_save=["block", "block.0"])
    assert "inside another one" in nk.save_adapter(model, tmp_path / "adapter").reasons[0]
    assert torch.equal(nk.load_adapter(Net(), tmp_path / "adapter").eval()(X), model.eval()(X))


def test_a_task_is_named_only_for_models_that_peft_can_wrap(tmp_path):
    class ToyForCausalLM(Net):
        pass

    class ToyForSequenceClassification(Net):
        def __init__(self):
            super().__init__()
            self.score, self.attn_score = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.attn_score(self.score(super().forward(x)))

    for kind, saved in ((ToyForCausalLM, None), (ToyForSequenceClassification, ["head"])):
        model = neat(kind(), "lin", modules_to_save=saved)
        nk.save_adapter(model, tmp_path / kind.__name__)
        peft_model = PeftModel.from_pretrained(kind(), tmp_path / kind.__name__)
        torch.testing.assert_close(peft_model.eval()(X), model.eval()(X))


def test_a_shared_bias_that_trains_is_no_part_of_the_base(tmp_path, recwarn):
    def make():
        model = Net()
        model.mid.bias = model.lin.bias
        return model

    model = neat(make(), "lin", "mid")
    model.lin.bias.requires_grad_(True)
    nk.save_adapter(shake(model), tmp_path / "adapter")
    loaded = nk.load_adapter(make(), tmp_path / "adapter")
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert not [w for w in recwarn if issubclass(w.category, nk.BaseMismatchWarning)]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(nk.AdapterError, match="expected another folder than the current one"):
        nk.save_adapter(neat(Net(), "lin"), ".")
    assert not list(tmp_path.parent.glob(".*older*"))
