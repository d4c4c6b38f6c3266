"""What NeatCallback adds to the logs of a Trainer."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import neat_kernels as nk
from neat_kernels.integrations.updates import measure_updates

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from models import make_case  # noqa: E402
from test_docs import ROOT, blocks, read  # noqa: E402
from trainer_problem import LENGTH, WAYS, Texts, adapted, trained, trainer_of  # noqa: E402

from neat_kernels.integrations import trainer as module  # noqa: E402
from neat_kernels.integrations.trainer import NeatCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("frozen_garbage")

ALWAYS = {"neat/step_time_s", "neat/tokens_per_second", "neat/peak_memory_mib"}


class Reporter(transformers.TrainerCallback):
    """What W&B and TensorBoard are to a Trainer."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def delta(layer):
    """‖ΔW‖_F of the matrix itself."""
    if isinstance(layer, nk.FusedNeatLinear):
        return layer.delta_weight().double().norm().item()
    return sum(layer.get_delta_weight(name).double() for name in layer.active_adapters).norm().item()


def base_norm(layer):
    weight = layer.base_weight if isinstance(layer, nk.FusedNeatLinear) else layer.get_base_layer().weight
    return weight.double().norm().item()


def test_the_page_s_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "trainer.md"
    ((_, source),) = blocks(read(page), "python")
    exec(compile(source, str(page), "exec"), {"__name__": "page"})
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0


@pytest.mark.parametrize("name", ["llama", "roberta"])
@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_norms_are_those_of_the_matrix(name, way):
    model = adapted(name, way)
    updates, left_out = measure_updates(model)
    assert not left_out
    assert len(updates) == (6 if name == "llama" else 4)
    for layer, update in updates.items():
        assert update.delta_norm == pytest.approx(delta(model.get_submodule(layer)), rel=1e-5)
        assert update.weight_norm == pytest.approx(base_norm(model.get_submodule(layer)), rel=1e-5)
        assert update.features == 0


def test_norm_survives_factors_that_nearly_cancel():
    layer = nk.FusedNeatLinear(40, 30, r=2, activation="identity", dtype=torch.float32)
    with torch.no_grad():
        layer.neat_A[1].copy_(layer.neat_A[0] * (1 + 2**-12))
        layer.neat_B[:, 0] = torch.randn(30)
        layer.neat_B[:, 1] = -layer.neat_B[:, 0]
        D, U = layer.lora_factors()
    (update,) = measure_updates(layer)[0].values()
    assert update.delta_norm == pytest.approx((U.double() @ D.double()).norm().item(), rel=1e-9)


def test_several_active_adapters_are_one_update():
    model = adapted("llama", "peanut")
    model.add_adapter("second", peft.PeanutConfig(r=3, target_modules=["q_proj"], act_fn="tanh", scaling=0.7))
    for name, p in model.named_parameters():
        if "peanut_B.second" in name:
            nn.init.normal_(p)
    model.base_model.set_adapter(["default", "second"])
    updates, left_out = measure_updates(model)
    both = [name for name in updates if name.endswith("q_proj")]
    assert both
    assert not left_out
    for name in both:
        assert updates[name].delta_norm == pytest.approx(delta(model.get_submodule(name)), rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_dead_features_are_counted(way):
    model = adapted("llama", way, "relu", depth=0)
    killed = [p for name, p in model.named_parameters() if "neat_A" in name or "peanut_A" in name][:2]
    with torch.no_grad():
        killed[0][1] = 0.0
        killed[1][:3] = 0.0
    updates, _ = measure_updates(model)
    assert [update.dead for update in updates.values()] == [1, 3, 0, 0, 0, 0]
    assert {update.features for update in updates.values()} == {4}


def test_weight_norms_are_read_once(monkeypatch):
    from neat_kernels.integrations import updates

    model, read = adapted("llama", "fused"), []
    norm = updates._norm
    monkeypatch.setattr(updates, "_norm", lambda W: read.append(W) or norm(W))
    norms = {}
    first, _ = measure_updates(model, norms)
    second, _ = measure_updates(model, norms)
    assert first == second
    assert len(read) == len(norms) == 6


def stock(act_fn="relu"):
    config = peft.PeanutConfig(r=2, target_modules=["0"], act_fn=act_fn)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)


def dora():
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(target_modules=["0"], use_dora=True))


def merged():
    model = stock()
    model.merge_adapter()
    return model


def embedding():
    return peft.get_peft_model(nn.Sequential(nn.Embedding(8, 6)), peft.LoraConfig(target_modules=["0"]))


def convolution():
    return peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 6, 3)), peft.LoraConfig(target_modules=["0"]))


def other_method():
    return peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: stock("mish"), "act_fn 'mish'"),
        (dora, "not the product of its factors"),
        (merged, "it is merged"),
        (embedding, "embedding"),
        (convolution, "Conv2d"),
        (other_method, "no layer of PEANuT, NEAT or LoRA"),
    ],
    ids=["activation", "dora", "merged", "embedding", "convolution", "vera"],
)
def test_what_cannot_be_measured_is_named(make, reason):
    updates, left_out = measure_updates(make())
    assert not updates
    (found,) = left_out.values()
    assert reason in found


def test_stock_peanut_is_measured_too():
    model = stock()
    nn.init.normal_(model.base_model.model[0].peanut_B["default"].weight)
    updates, _ = measure_updates(model)
    (update,) = updates.values()
    assert update.delta_norm == pytest.approx(delta(model.base_model.model[0]), rel=1e-5)
    assert update.features == 2


@pytest.mark.parametrize("method", ["neat", "lora"])
def test_norms_over_a_quantised_weight(method):
    from neat_kernels.integrations.peft import NeatConfig

    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 48))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    config = NeatConfig(target_modules=["0"], r=2) if method == "neat" else peft.LoraConfig(target_modules=["0"], r=2)
    model = peft.get_peft_model(model, config)
    layer = model.base_model.model[0]
    nn.init.normal_((layer.neat_B if method == "neat" else layer.lora_B)["default"].weight)
    updates, left_out = measure_updates(model)
    (update,) = updates.values()
    assert not left_out
    assert update.weight_norm == pytest.approx(layer.get_base_layer().weight.dequantize().double().norm().item())
    assert update.delta_norm == pytest.approx(delta(layer), rel=1e-5)


def test_a_shard_is_no_matrix():
    layer = nk.FusedNeatLinear(8, 6, r=2)
    layer.neat_A.data = torch.empty(0)
    updates, left_out = measure_updates(layer)
    assert not updates
    assert "sharded" in left_out[""]


@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_figures_reach_the_history_and_every_reporter(way, tmp_path, monkeypatch):
    reporter = Reporter()
    # Where a Trainer takes the callbacks of report_to from.
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [reporter])
    model = adapted("llama", way, "relu")
    trainer = trainer_of(model, tmp_path, Texts("llama"), max_steps=2)
    NeatCallback(per_layer=True).attach(trainer)
    trainer.train()
    updates, _ = measure_updates(model)
    expected = {"neat/delta_norm", "neat/delta_norm_relative", *(f"neat/delta_norm/{layer}" for layer in updates)}
    expected |= ALWAYS | (set() if way == "lora" else {"neat/dead_relu_share"})
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [1, 2]
    for entry, (step, logs) in zip(history, reporter.seen, strict=False):
        assert {name for name in entry if name.startswith("neat/")} == expected
        assert {**logs, "step": step} == entry
    # The last log is the summary of the run, which is none of ours.
    assert not any(name.startswith("neat/") for name in reporter.seen[-1][1])
    last = history[-1]
    total = math.sqrt(sum(update.delta_norm**2 for update in updates.values()))
    assert last["neat/delta_norm"] == pytest.approx(total, rel=1e-9)
    frozen = math.sqrt(sum(update.weight_norm**2 for update in updates.values()))
    assert last["neat/delta_norm_relative"] == pytest.approx(total / frozen, rel=1e-9)


def test_every_asks_for_logs_and_measures_only_then(tmp_path):
    trainer = trainer_of(adapted("llama", "neat"), tmp_path, Texts("llama"), max_steps=5, logging_steps=3)
    NeatCallback(every=2).attach(trainer)
    trainer.train()
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, entry in history.items() if "neat/delta_norm" in entry] == [2, 4]
    assert list(history) == [2, 3, 4]
    assert all(entry.keys() >= ALWAYS for entry in history.values())


@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_training_is_the_same_bit_for_bit_with_the_callback(way, tmp_path):
    def run(watched):
        dropout = {"lora_dropout": 0.3} if way == "lora" else {} if way == "peanut" else {"dropout": 0.3}
        model = adapted("roberta", way, "gelu", **dropout)
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.1
        trainer = trainer_of(model, tmp_path, Texts("roberta"), gradient_accumulation_steps=2)
        if watched:
            NeatCallback().attach(trainer)
        trainer.train()
        return trained(model)

    plain, watched = run(False), run(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_tokens_are_those_of_the_mask(accumulated, tmp_path):
    data = Texts("roberta", padded=3)
    arguments = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": accumulated}
    trainer = trainer_of(adapted("roberta", "neat"), tmp_path, data, **arguments)
    NeatCallback().attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    counted = [entry["neat/tokens_per_second"] * entry["neat/step_time_s"] * 2 for entry in history]
    assert counted == pytest.approx([2 * 4 * accumulated * (LENGTH - 3)] * 2)


def test_tokens_without_a_mask_are_all_and_without_tokens_none():
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    assert module._tokens({"input_ids": tokens}) == 10
    # The mask of packed sequences may be one over pairs of tokens.
    assert module._tokens({"input_ids": tokens, "attention_mask": torch.ones(2, 1, 5, 5)}) == 10
    assert module._tokens({"pixel_values": torch.zeros(2, 3)}) is None
    assert module._tokens([{"prompt": "text"}]) is None


def on(*devices):
    """A model with parameters on devices that need not be there."""
    return SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device(device)) for device in devices])


def test_peak_memory_is_that_of_the_fullest_gpu_of_the_model(monkeypatch):
    peaks = {"cuda:0": 3 << 20, "cuda:1": 5 << 20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[str(device)])
    assert module._peak_memory(on("cuda:0", "cpu")) == {"peak_memory_mib": 3.0}
    assert module._peak_memory(on("cuda:0", "cuda:1")) == {"peak_memory_mib": 5.0}
    # Neither torch's peak nor that of the process would be about this model.
    assert module._peak_memory(on("mps")) == {}


def test_peak_memory_of_a_model_on_the_cpu_is_the_process_s():
    resource = pytest.importorskip("resource")
    (peak,) = module._peak_memory(on("cpu")).values()
    unit = 1 if sys.platform == "darwin" else 1024
    assert 0 < peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def test_time_of_evaluation_and_saving_is_left_out(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = adapted("llama", "fused")
    trainer = trainer_of(model, tmp_path, Texts("llama"))
    callback = NeatCallback().attach(trainer)
    state, control = transformers.TrainerState(), transformers.TrainerControl()

    def event(name, at, **given):
        clock.now = 100.0 + at
        getattr(callback, name)(trainer.args, state, control, model=model, **given)

    event("on_train_begin", 0)
    event("on_step_begin", 10)
    state.global_step = 1
    event("on_step_end", 12)
    event("on_evaluate", 50)
    event("on_save", 60)
    event("on_step_begin", 61)
    state.global_step = 2
    event("on_step_end", 63)
    logs = {"loss": 1.0}
    event("on_log", 64, logs=logs)
    # 54 seconds from the first step to the log, 48 of them for evaluation and saving.
    assert logs["neat/step_time_s"] == 3.0
    event("on_evaluate", 80)
    event("on_step_begin", 81)
    state.global_step = 3
    event("on_step_end", 83)
    logs = {"loss": 1.0}
    event("on_log", 84, logs=logs)
    assert logs["neat/step_time_s"] == 4.0


def test_a_model_without_adapters_is_told_once(tmp_path):
    model, _ = make_case("llama")
    trainer = trainer_of(model, tmp_path, Texts("llama"), max_steps=2)
    NeatCallback().attach(trainer)
    with pytest.warns(UserWarning, match="measures 0 of 0 adapted layers: the model: it has no adapted layer") as told:
        trainer.train()
    assert sum("NeatCallback" in str(warning.message) for warning in told) == 1
    assert "neat/delta_norm" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0].keys() >= ALWAYS


def test_a_place_behind_the_reporters_is_refused(tmp_path):
    model, data = adapted("llama", "fused"), Texts("llama")
    with pytest.raises(ValueError, match="attach"):
        trainer_of(model, tmp_path, data, {"callbacks": [NeatCallback()]})
    trainer = trainer_of(model, tmp_path, data)
    trainer.add_callback(NeatCallback)
    with pytest.raises(ValueError, match="attach"):
        trainer.train()


def test_attach_refuses_a_second_one_and_anything_else(tmp_path):
    model, data = adapted("llama", "fused"), Texts("llama")
    trainer = trainer_of(model, tmp_path, data)
    callback = NeatCallback().attach(trainer)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="not attached yet"):
        NeatCallback().attach(trainer)
    assert trainer.callback_handler.callbacks == before
    with pytest.raises(ValueError, match="not attached yet"):
        callback.attach(trainer_of(model, tmp_path, data))
    with pytest.raises(TypeError, match="expected a Trainer"):
        NeatCallback().attach(model)


@pytest.mark.parametrize(
    ("options", "error"), [({"every": 0}, ValueError), ({"every": 1.5}, TypeError), ({"per_layer": 1}, TypeError)]
)
def test_options_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        NeatCallback(**options)
