"""The Trainer of transformers trains what a plain loop trains, with everything that it can be asked for."""

import copy
import shutil

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from trainer_problem import SGD, WAYS, Texts, adapted, assert_same, loop, trained, trainer_of  # noqa: E402

from neat_kernels.integrations.peft import accelerate  # noqa: E402
from neat_kernels.integrations.trainer import NeatCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("frozen_garbage")

NAMES = ("llama", "roberta")


def assert_equal(ours, expected):
    assert_same(ours, expected, rtol=0.0, atol=0.0)


def moved(model, before):
    return {name for name, p in trained(model).items() if not torch.equal(p, before[name])}


def mean_over_all(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_trains_what_a_loop_trains(way, name, precision, tmp_path):
    model, data = adapted(name, way), Texts(name)
    expected, before = copy.deepcopy(model), trained(model)
    if way == "peanut" and precision == "fp32":
        accelerate(expected, undo=True)
    trainer = trainer_of(model, tmp_path, data, **SGD, bf16=precision == "bf16")
    NeatCallback().attach(trainer)
    trainer.train()
    losses = loop(expected, data, dtype=torch.bfloat16 if precision == "bf16" else None)
    assert moved(model, before) == before.keys()
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-5)
    assert_same(trained(model), trained(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_are_those_of_a_larger_batch(way, name, tmp_path):
    model, data = adapted(name, way).double(), Texts(name)
    whole, before = copy.deepcopy(model), trained(model)
    arguments = {**SGD, "max_steps": 2}
    # The Trainer takes a classifier's own loss for one that is divided by the labels of all micro-batches, and adds up.
    given = {"compute_loss_func": mean_over_all} if name == "roberta" else {}
    trainer_of(model, tmp_path, data, given, gradient_accumulation_steps=2, **arguments).train()
    trainer_of(whole, tmp_path, data, given, per_device_train_batch_size=8, **arguments).train()
    assert moved(model, before) == before.keys()
    assert_same(trained(model), trained(whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_gradients_are_the_same(way, name, use_reentrant, tmp_path):
    model, data = adapted(name, way).double(), Texts(name)
    expected, before = copy.deepcopy(model), trained(model)
    arguments = {**SGD, "max_steps": 2}
    trainer_of(expected, tmp_path, data, **arguments).train()
    arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    trainer = trainer_of(model, tmp_path, data, gradient_checkpointing=True, **arguments)
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert moved(model, before) == before.keys()
    assert_same(trained(model), trained(expected), rtol=1e-9, atol=1e-12)


def test_compiled_training_is_the_same(tmp_path):
    model, data = adapted("llama", "neat").double(), Texts("llama")
    expected, before = copy.deepcopy(model), trained(model)
    torch._dynamo.reset()
    arguments = {**SGD, "max_steps": 1}
    trainer_of(expected, tmp_path, data, **arguments).train()
    trainer = trainer_of(model, tmp_path, data, torch_compile=True, torch_compile_backend="aot_eager", **arguments)
    NeatCallback().attach(trainer)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert moved(model, before) == before.keys()
    assert_same(trained(model), trained(expected), rtol=1e-9, atol=1e-12)
    assert "neat/delta_norm" in trainer.state.log_history[0]


def with_dropout(name, way):
    options = {} if way == "peanut" else {"dropout": 0.2}
    if name == "roberta":
        options["modules_to_save"] = ["classifier"]
    model = adapted(name, way, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(way, name, tmp_path):
    data = Texts(name, size=24)
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    arguments |= {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2}
    whole, resumed = with_dropout(name, way), with_dropout(name, way)
    trainer = trainer_of(whole, tmp_path, data, **arguments)
    NeatCallback().attach(trainer)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trainer_of(resumed, tmp_path, data, **arguments)
    NeatCallback().attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(trained(resumed), trained(whole))
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert losses_of(again) == losses_of(trainer)
    norms = [[entry["neat/delta_norm"] for entry in t.state.log_history if "loss" in entry] for t in (again, trainer)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_the_best_model_is_loaded_at_the_end(way, name, tmp_path):
    data, scores = Texts(name), iter([1.0, 3.0, 2.0, 0.0])
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        **SGD,
    }
    given = {"eval_dataset": data, "compute_metrics": lambda prediction: {"score": next(scores)}}
    trainer = trainer_of(adapted(name, way), tmp_path, data, given, max_steps=4, **arguments)
    NeatCallback().attach(trainer)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_global_step == 2
    assert len(set(evaluated.values())) == 4
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == evaluated[2]
