"""The benchmarks time what is right and refuse what is wrong."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import model_step
from benchmarks.contenders import CONTENDERS, Layer
from benchmarks.measure import WrongResultError, check, interleaved_samples
from benchmarks.models import Model
from benchmarks.problem import make_problem
from benchmarks.shapes import LayerShape, parse_shapes

SHAPE = LayerShape(tokens=33, in_features=48, out_features=40, r=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_the_layer_it_claims_to_be(name, dtype):
    contender = CONTENDERS[name]
    if contender.unavailable() is not None:
        pytest.skip(contender.unavailable())
    problem = make_problem(SHAPE, dtype, torch.device("cpu"))
    layer = contender.build(problem)
    assert set(check(contender, layer, problem)) == {"y", "dx", *layer.trainable}
    assert contender.update == "none" or set(layer.trainable) == {"dA", "dB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["no update", "no activation", "detached features", "scaled dy"])
def test_a_wrong_contender_is_refused(fault, dtype):
    problem = make_problem(SHAPE, dtype, torch.device("cpu"))
    A, B = (torch.nn.Parameter(t.to(dtype)) for t in problem.adapters["neat"])

    def forward(x):
        features = A @ problem.weight
        features = features if fault == "no activation" else torch.relu(features)
        features = features.detach() if fault == "detached features" else features
        delta = B * 0 @ features if fault == "no update" else B @ features
        y = torch.nn.functional.linear(x, problem.weight + delta, problem.bias)
        return 1.1 * y - 0.1 * y.detach() if fault == "scaled dy" else y

    with pytest.raises(WrongResultError, match="float64"):
        check(CONTENDERS["neat"], Layer(forward, {"dA": A, "dB": B}), problem)


def test_contenders_take_turns_until_their_time_is_spent():
    calls = []

    def sampler(name):
        return lambda: (calls.append(name), 10.0)[1]

    samplers = {name: sampler(name) for name in ("first", "second")}
    samples = interleaved_samples(samplers, {"first": 1, "second": 4}, seconds=0.04, at_most=3)
    assert calls == ["first", "second", "first", "first"]
    assert {name: len(values) for name, values in samples.items()} == {"first": 3, "second": 1}
    assert all(len(values) == 1 for values in interleaved_samples(samplers, dict.fromkeys(samplers, 1), 0.0).values())


def test_shapes_are_read_as_they_are_printed():
    assert parse_shapes(str(SHAPE)) == (SHAPE,)
    assert dataclasses.astuple(SHAPE) == (33, 48, 40, 4)
    for text in ("33x48x40", "33x48x40x0", "axbxcxd", "gpus"):
        with pytest.raises(ValueError, match="TOKENSxINxOUTxR"):
            parse_shapes(text)


TINY = Model(
    {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 32,
    },
    ("q_proj", "v_proj"), r=2, batch=2, length=8,
)  # fmt: skip
# Of q and v, which are square; of all, where gate and up are 16→24 and down 24→16. A of Neat is as long as the output.
TRAINED = {
    "frozen": (0, 0),
    "neat": (2 * 2 * 32, 4 * 2 * 32 + 2 * (48 + 48 + 32)),
    "peft_lora": (2 * 2 * 32, 4 * 2 * 32 + 3 * 2 * 40),
}
TRAINED |= {"peft_lora_half": TRAINED["peft_lora"], "peft_peanut": TRAINED["neat"]}


def options_of(**more):
    asked = {"model": "tiny", "targets": "default", "dtype": "float32", "device": "cpu", "threads": 1, "steps": 1}
    return SimpleNamespace(**(asked | more))


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("name", model_step.CONTENDERS)
def test_every_contender_trains_the_model_from_the_same_loss(name, targets, monkeypatch):
    monkeypatch.setitem(model_step.MODELS, "tiny", TINY)
    run = model_step._measure(name, options_of(targets=targets))
    if name in TRAINED:
        assert run["trained"] == TRAINED[name][targets == "all-linear"]
    assert len(run["ms"]) == 1
    assert run["peak_bytes"] > 0


def test_a_model_with_another_loss_is_not_timed(monkeypatch):
    def broken(model, settings, targets):
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        return model

    monkeypatch.setitem(model_step.MODELS, "tiny", TINY)
    monkeypatch.setitem(model_step.CONTENDERS, "broken", broken)
    with pytest.raises(RuntimeError, match="expected the frozen model's loss"):
        model_step._measure("broken", options_of())


def test_a_contender_that_fails_is_told_and_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    found = {"frozen": {"trained": 0, "ms": [2.0], "peak_bytes": None, "loss": 1.0}, "neat": {"failed": "no memory"}}
    monkeypatch.setattr(model_step, "_fresh_process", lambda name, options: found[name])
    arguments = ["--contenders", "neat", "frozen", "--output", str(tmp_path / "out.json")]
    assert model_step.main(arguments) == 1
    assert "failed: no memory" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == found
