"""The parameter groups of an optimizer: each trained parameter in one, with the learning rate that was asked for."""

import pytest
import torch
from torch import nn

import neat_kernels as nk
from neat_kernels.integrations.parameter_groups import parameter_groups

pytest.importorskip("transformers")
pytest.importorskip("peft")

from trainer_problem import WAYS, Texts, adapted, trained, trainer_of

pytestmark = pytest.mark.usefixtures("frozen_garbage")

PARTS = {
    "A": ("neat_A", "peanut_A", "lora_A"),
    "B": ("neat_B", "peanut_B", "lora_B"),
    "chain": ("neat_encoders", "neat_decoders", "peanut_encoders", "peanut_decoders"),
}


def by_name(model, groups):
    """Names of the parameters of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_each_trained_parameter_is_in_the_group_of_its_name(way):
    options = {} if way == "lora" else {"modules_to_save": ["classifier"]}
    model = adapted("roberta", way, **options)
    groups = parameter_groups(model, lr=1.0, lr_A=2.0, lr_B=3.0, lr_other=5.0, weight_decay=0.1)
    found = by_name(model, groups)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(name for names in found.values() for name in names) == sorted(expected)
    for group, parts in PARTS.items():
        assert set(found.get(group, [])) == {name for name in expected if any(part in name for part in parts)}
    assert ("chain" in found) == (way != "lora")
    assert all("classifier" in name and "bias" not in name for name in found["other"])
    assert all("classifier" in name and "bias" in name for name in found["other_vectors"])
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    rates.pop("chain", None)
    assert rates == {"A": (2.0, 0.1), "B": (3.0, 0.1), "other": (5.0, 0.1), "other_vectors": (5.0, 0.0)}


def test_an_optimizer_steps_with_each_rate():
    layer = nk.FusedNeatLinear(6, 5, r=2, depth=1, activation="tanh")
    layer.bias.requires_grad_(True)
    groups = parameter_groups(layer, lr=1e-3, lr_A=1e-1, lr_B=1e-2, lr_chain=0.0)
    before = trained(layer)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(groups).step()
    expected = {"neat_A": 1e-1, "neat_B": 1e-2, "neat_encoders.0": 0.0, "neat_decoders.0": 0.0, "bias": 1e-3}
    assert trained(layer).keys() == expected.keys()
    for name, p in trained(layer).items():
        torch.testing.assert_close(p, before[name] - expected[name])


def test_fused_lora_has_its_groups():
    groups = parameter_groups(nk.FusedLoraLinear(nn.Linear(6, 5), r=2), lr=1e-3, lr_B=1e-2)
    assert [(group["name"], group["lr"]) for group in groups] == [("A", 1e-3), ("B", 1e-2)]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Linear(3, 2).requires_grad_(False), {}, ValueError, "none that requires a gradient"),
        (lambda: nn.Linear(3, 2), {}, ValueError, "expected trained adapters .* 1 of other, 1 of other_vectors"),
        (lambda: nk.FusedNeatLinear(3, 2, r=1), {"lr_chain": 0.1}, ValueError, "lr_chain .* 1 of A, 1 of B"),
        (lambda: nk.FusedNeatLinear(3, 2, r=1), {"lr_other": 0.1}, ValueError, "lr_other"),
        (lambda: nk.FusedNeatLinear(3, 2, r=1), {"lr_A": -0.1}, ValueError, "lr_A must be finite and at least 0"),
        (lambda: nk.FusedNeatLinear(3, 2, r=1), {"lr": float("nan")}, ValueError, "lr must be finite"),
        (lambda: nk.FusedNeatLinear(3, 2, r=1), {"weight_decay": "0.1"}, TypeError, "weight_decay must be a float"),
        (dict, {}, TypeError, "expected a model, got dict"),
    ],
    ids=["frozen", "no adapter", "no chain", "no other", "negative", "nan", "text", "no model"],
)
def test_what_is_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        parameter_groups(make(), **{"lr": 1e-3, **options})


def test_a_frozen_part_has_no_rate():
    layer = nk.FusedNeatLinear(3, 2, r=1)
    layer.neat_A.requires_grad_(False)
    with pytest.raises(ValueError, match="lr_A"):
        parameter_groups(layer, lr=1e-3, lr_A=1e-2)


@pytest.mark.parametrize("by", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_takes_them(by, tmp_path):
    model = adapted("roberta", "neat", modules_to_save=["classifier"])
    groups = parameter_groups(model, lr=1e-3, lr_A=0.0, lr_B=4e-3)
    if by == "optimizers":
        given = {"optimizers": (torch.optim.AdamW(groups), None)}
    else:
        given = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups})}
    before = trained(model)
    # A schedule multiplies each group's own rate.
    arguments = {"max_steps": 2, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(model, tmp_path, Texts("roberta"), given, **arguments)
    trainer.train()
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"A": 0.0, "B": 4e-3, "chain": 1e-3, "other": 1e-3, "other_vectors": 1e-3}
    saved = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in saved["param_groups"]] == [0.0, 2e-3, 5e-4, 5e-4, 5e-4]
    moved = {name for name, p in trained(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "neat_A" not in name}
