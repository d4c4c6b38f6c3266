"""The benchmarks time what is right and refuse what is wrong."""

import dataclasses
import json
import statistics
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import layer_ratio, model_step
from benchmarks.models import Model
from neat_kernels.bench import BenchError, measure, provenance
from neat_kernels.bench.contenders import CONTENDERS, Layer, check_company
from neat_kernels.bench.measure import (
    MODES,
    WrongResultError,
    check,
    interleaved_samples,
    run,
    sample_ms,
    weight_copies,
)
from neat_kernels.bench.memory import peak_bytes, saved_bytes
from neat_kernels.bench.problem import make_problem
from neat_kernels.bench.processes import fresh_processes, is_sound, summarize
from neat_kernels.bench.shapes import LAYERS, TOKENS, LayerShape, parse_shapes

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
    errors = check(contender, layer, problem, "inference")
    assert set(errors) == ({"y", "y of features given"} if name in ("neat", "neat_half") else {"y"})


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


def test_a_stale_cache_of_features_is_refused():
    """The second inference reads what the first has cached; a layer whose second answer is another is not timed."""
    problem = make_problem(SHAPE, torch.float32, torch.device("cpu"))
    layer = CONTENDERS["neat"].build(problem)
    calls = []

    def forward(x):
        calls.append(x)
        return layer.forward(x) * (1.0 if len(calls) == 1 else 1.1)

    with pytest.raises(WrongResultError, match=r"y 1\.0e-01"):
        check(CONTENDERS["neat"], Layer(forward, layer.trainable), problem, "inference")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_what_it_says(mode):
    problem = make_problem(SHAPE, torch.float32, torch.device("cpu"))
    seen = []

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append("backward")
            return dy

    def call(x):
        seen.append("forward with gradients" if torch.is_grad_enabled() else "forward")
        return Told.apply(x) @ problem.weight.T

    layer = Layer(call)
    assert sample_ms([layer, layer], problem, mode) > 0
    forward, backward = "forward with gradients", "backward"
    assert (
        seen
        == {
            "training": [forward, backward] * 2,
            "forward": [forward] * 2,
            "backward": [forward] * 2 + [backward] * 2,
            "inference": ["forward"] * 2,
        }[mode]
    )


def test_memory_is_what_the_layer_allocates_and_saves():
    """Worked out by hand for fp32: x [M,K] alone, or with x·Dᵀ, or with ΔW and the features [r,K]."""
    problem = make_problem(LayerShape(64, 96, 80, 4), torch.float32, torch.device("cpu"))
    M, K, N, r = 64, 96, 80, 4
    saved = {name: saved_bytes(CONTENDERS[name].build(problem), problem) for name in ("frozen", "peft_lora", "formula")}
    assert saved == {
        "frozen": 0,
        "peft_lora": 4 * (M * K + M * r),
        # W + ΔW for dx, and relu's result, which B multiplies too.
        "formula": 4 * (M * K + N * K + r * K),
    }
    layer = CONTENDERS["frozen"].build(problem)
    run(layer, problem)
    assert peak_bytes(layer, problem) == 4 * M * (N + K)
    assert peak_bytes(layer, problem, "inference") == 4 * M * N


def test_weights_rotate_over_more_than_the_cache_where_they_are_read_from_memory(monkeypatch, tmp_path):
    sizes = tmp_path / "size"
    sizes.write_text("64K\n")
    monkeypatch.setattr(measure, "_CPU_CACHE", sizes)
    few, many = (make_problem(LayerShape(M, 128, 64, 2), torch.float32, torch.device("cpu")) for M in (64, 65))
    assert weight_copies(few) == 4 * 64 * 1024 // (128 * 64 * 4)
    assert weight_copies(many) == 1
    sizes.write_text("1G\n")
    assert weight_copies(few) == 256


def test_an_alone_contender_is_refused_company():
    check_company(["frozen", "unsloth_lora"])
    with pytest.raises(ValueError, match="got neat too"):
        check_company(["frozen", "neat", "unsloth_lora"])


CASE = {
    "mode": "training", "shape": "80x24x20x2", "dtype": "float32", "device": "cpu", "threads": 1, "seconds": 0.01,
    "contenders": ["frozen", "neat", "lora_by_hand"],
}  # fmt: skip


def test_processes_take_turns_and_their_ratios_are_taken_within_each():
    told = []
    cases = [CASE, {**CASE, "mode": "inference", "contenders": ["frozen", "neat"]}]
    training, inference = fresh_processes(cases, 2, time.monotonic() + 300, told.append, quiet=True)
    assert [next(iter(run["contenders"])) for run in training] == ["frozen", "neat"]
    assert [case["mode"] for case in told] == ["training", "inference"] * 2
    assert is_sound(training)
    summary = summarize(training)
    ratios = [
        statistics.median(run["contenders"]["neat"]["samples_ms"])
        / statistics.median(run["contenders"]["frozen"]["samples_ms"])
        for run in training
    ]
    expected = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    assert summary["ratios"]["neat/frozen"] == expected
    assert set(summary["saved_bytes"]) == set(CASE["contenders"])
    assert "saved_bytes" not in summarize(inference)
    assert fresh_processes([CASE], 2, time.monotonic() - 1) == [[]]


def test_a_process_that_ends_early_is_an_error_that_says_so():
    with pytest.raises(BenchError, match=r"exit status 1: .*no_such_dtype"):
        fresh_processes([{**CASE, "dtype": "no_such_dtype"}], 1, time.monotonic() + 300, quiet=True)


def test_layer_ratio_goes_on_where_it_stopped(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    command = ["--shapes", "80x24x20x2", "--dtypes", "float32", "--seconds", "0.01", "--processes", "1",
               "--contenders", "neat", "--output", str(output)]  # fmt: skip
    assert layer_ratio.main([*command, "--modes", "training", "inference", "--limit", "0"]) == 1
    assert not output.exists()
    assert layer_ratio.main([*command, "--modes", "training"]) == 0
    (first,) = json.loads(output.read_text())["cases"]
    asked = []
    measured = layer_ratio.fresh_processes
    monkeypatch.setattr(
        layer_ratio, "fresh_processes", lambda cases, *rest: (asked.extend(cases), measured(cases, *rest))[1]
    )
    assert layer_ratio.main([*command, "--modes", "training", "inference", "--resume"]) == 0
    assert [case["mode"] for case in asked] == ["inference"]
    kept, new = json.loads(output.read_text())["cases"]
    assert kept == first
    assert new["mode"] == "inference"


def test_the_registry_has_the_layers_of_the_models():
    assert LAYERS["llama-3-8b.down_proj"] == (14336, 4096)
    assert LAYERS["qwen3-8b.gate_proj"] == (4096, 12288)
    assert (TOKENS[0], TOKENS[-1]) == (1, 32768)
    assert parse_shapes("llama-3.2-3b.k_proj@768x32") == (LayerShape(768, 3072, 1024, 32),)
    assert len(parse_shapes("roberta-base@128")) == 3
    assert len(parse_shapes("cpu-eight")) == 8
    with pytest.raises(ValueError, match=r"did you mean llama-3-8b.q_proj\?"):
        parse_shapes("llama-3-8b.qproj@16")
    with pytest.raises(ValueError, match="LAYER@TOKENSxR with positive integers"):
        parse_shapes("llama-3-8b.q_proj@0")


def test_a_result_says_the_commit_of_this_repository_only(tmp_path, monkeypatch):
    monkeypatch.delenv("NEAT_KERNELS_COMMIT", raising=False)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "site-packages")
    (tmp_path / "site-packages").mkdir()
    assert provenance._commit() == "unknown"
    monkeypatch.setenv("NEAT_KERNELS_COMMIT", "abc")
    assert provenance._commit() == "abc"


def test_samples_stand_on_one_line(tmp_path):
    content = {"a": [1.5, -2e-05, 3], "b": [], "c": ["1", "2"], "d": "[ 1, 2 ]", "e": [[1, 2], [3]]}
    provenance.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert "[1.5, -2e-05, 3]" in text


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
