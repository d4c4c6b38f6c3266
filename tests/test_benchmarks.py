"""The benchmarks time what is right and refuse what is wrong."""

import dataclasses
import json
import statistics
import subprocess
import time

import pytest
import torch

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
from neat_kernels.bench.worker import _graphs

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


def test_a_gradient_that_is_missing_is_refused():
    problem = make_problem(SHAPE, torch.float32, torch.device("cpu"))
    layer = CONTENDERS["neat"].build(problem)
    del layer.trainable["dB"]
    with pytest.raises(WrongResultError, match="dB inf"):
        check(CONTENDERS["neat"], layer, problem)


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


def test_a_graph_is_not_drawn_of_a_cache_that_it_cannot_read():
    problem = make_problem(SHAPE, torch.float32, torch.device("cpu"))
    layer = CONTENDERS["accelerated"].build(problem)
    report = {"accelerated": {}}
    assert _graphs({"accelerated": [layer]}, problem, "inference", report) == {}
    assert report["accelerated"]["no_graph"] == "a graph reads no cache of features"
