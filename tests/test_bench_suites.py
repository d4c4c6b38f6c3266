"""The commands of benchmarks/: whole models, what goes on where it stopped, and the suites of a CPU and a GPU."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cpu_suite, layer_ratio, model_contenders, model_step
from benchmarks.models import Model
from neat_kernels.bench import BenchError, processes, provenance
from neat_kernels.bench.model_results import read_model_results
from neat_kernels.bench.model_results import summarize as summarize_models


def test_layer_ratio_goes_on_where_it_stopped(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    command = ["--shapes", "80x24x20x2", "--dtypes", "float32", "--seconds", "0.01", "--processes", "1",
               "--contenders", "neat", "--output", str(output)]  # fmt: skip
    assert layer_ratio.main([*command, "--modes", "training", "inference", "--limit", "0"]) == 1
    assert not output.exists()
    assert layer_ratio.main([*command, "--modes", "training"]) == 0
    (first,) = json.loads(output.read_text())["cases"]
    asked = []
    measured = layer_ratio.fresh_process

    def fresh(cases, *rest):
        asked.extend(cases)
        return measured(cases, *rest)

    monkeypatch.setattr(layer_ratio, "fresh_process", fresh)
    assert layer_ratio.main([*command, "--modes", "training", "inference", "--resume"]) == 0
    assert [case["mode"] for case in asked] == ["inference"]
    kept, new = json.loads(output.read_text())["cases"]
    assert kept == first
    assert new["mode"] == "inference"


def test_layer_ratio_adds_the_processes_that_are_missing(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    command = ["--shapes", "80x24x20x2", "--dtypes", "float32", "--seconds", "0.01", "--contenders", "neat",
               "--output", str(output), "--resume"]  # fmt: skip
    assert layer_ratio.main([*command, "--processes", "1"]) == 0
    first = json.loads(output.read_text())["cases"][0]["runs"]
    assert layer_ratio.main([*command, "--processes", "2"]) == 0
    runs = json.loads(output.read_text())["cases"][0]["runs"]
    assert runs[0] == first[0]
    assert [next(iter(run["contenders"])) for run in runs] == ["frozen", "neat"]
    assert "peak_bytes" in runs[0]["contenders"]["neat"]
    assert "peak_bytes" not in runs[1]["contenders"]["neat"]


@pytest.mark.parametrize("together", [(), ("--together",)])
def test_a_process_that_dies_costs_neither_what_it_has_done_nor_the_others(together, tmp_path, monkeypatch, capsys):
    """The second process dies in the second of three cases."""
    begun = []

    def measure(cases, done, quiet):
        begun.append([case["shape"] for case in cases])
        for number, case in enumerate(cases):
            if case["shape"] == "2x4x4x1" and not case["memory"]:
                raise BenchError("it died")
            timed = {"status": "timed", "adapter_dtype": "float32", "samples_ms": [1.0]}
            done(number, {"tolerance": 1.0, "weight_copies": 1, "contenders": dict.fromkeys(case["contenders"], timed)})

    monkeypatch.setattr(processes, "_process", measure)
    output = tmp_path / "out.json"
    command = ["--dtypes", "float32", "--contenders", "neat", "--processes", "2", "--output", str(output), *together]
    assert layer_ratio.main([*command, "--shapes", "1x4x4x1", "2x4x4x1", "3x4x4x1"]) == 1
    assert "it died" in capsys.readouterr().err
    counts = {case["shape"]: len(case["runs"]) for case in json.loads(output.read_text())["cases"]}
    assert counts == {"1x4x4x1": 2, "2x4x4x1": 1, "3x4x4x1": 1 if together else 2}
    assert len(begun) == (2 if together else 6)
    assert layer_ratio.main([*command, "--resume", "--shapes", "1x4x4x1", "3x4x4x1"]) == 0


def test_the_cpu_suite_runs_its_parts_and_says_what_is_not_complete(tmp_path, monkeypatch, capsys):
    ran = []

    def done(command, cwd):
        ran.append(command)
        return SimpleNamespace(returncode=int("decoding" in command[command.index("--output") + 1]))

    monkeypatch.setattr(cpu_suite.subprocess, "run", done)
    assert cpu_suite.main(["block", "decoding", "--output-dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["block", "complete"]
    assert "failed or not complete" in lines[-1]
    assert str(tmp_path / "block.json") in ran[0]
    assert cpu_suite.main(["--minutes", "0", "--output-dir", str(tmp_path)]) == 1
    assert len(ran) == 2
    with pytest.raises(SystemExit):
        cpu_suite.main(["everything"])


def test_the_parts_of_the_cpu_suite_are_commands_that_there_are(tmp_path):
    more = ["--threads", "2", "--processes", "5", "--output", str(tmp_path / "x.json"), "--resume", "--limit", "5"]
    for part, (_, module, *arguments) in cpu_suite.PARTS.items():
        parse = {"benchmarks.layer_ratio": layer_ratio, "benchmarks.model_step": model_step}[module]._parse
        assert parse([*arguments, *more]).processes == 5, part


SUITE = provenance.ROOT / "benchmarks" / "gpu_suite.sh"


def gpu_suite(out, *arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SUITE, *arguments], capture_output=True, text=True, env=environment)


def test_the_gpu_suite_skips_what_has_no_device_and_sums_up(tmp_path):
    done = gpu_suite(tmp_path, "environment", "layer-small", "model")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = [line.split(maxsplit=3) for line in done.stdout.splitlines()[-3:]]
    assert [(line[0], line[3]) for line in summary] == [
        ("environment", "ok"), ("layer-small", "skipped: no CUDA device"), ("model", "skipped: no CUDA device")
    ]  # fmt: skip
    assert json.loads((tmp_path / "layer-small.json").read_text())["outcome"] == "skipped: no CUDA device"
    again = gpu_suite(tmp_path, "--resume", "environment", "model", "kernels")
    assert "=== environment: done before" in again.stdout
    parts = [line.split()[0] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert parts == ["environment", "layer-small", "model", "kernels"]


def test_the_gpu_suite_refuses_a_part_that_it_has_not(tmp_path):
    done = gpu_suite(tmp_path / "out", "everything")
    assert done.returncode == 2
    assert "expected parts among: environment ceilings" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_gpu_suite_says_what_its_parts_are():
    text = SUITE.read_text()
    (listed,) = re.findall(r"^PARTS=\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^#   ([a-z-]+)  +\S", text, re.MULTILINE) == listed.split()


def test_a_file_of_a_part_that_was_skipped_is_nothing_to_go_on_with(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    provenance.write_json(path, {"provenance": provenance.provenance("x"), "outcome": "skipped"})
    command = ["--shapes", "80x24x20x2", "--dtypes", "float32", "--seconds", "0.01", "--processes", "1",
               "--contenders", "neat", "--output", str(path), "--resume"]  # fmt: skip
    assert layer_ratio.main(command) == 0
    provenance.write_json(path, {"provenance": provenance.provenance("x"), "outcome": "skipped"})
    monkeypatch.setattr(model_step, "_fresh_process", lambda name, options: step_of(2.0))
    assert model_step.main(["--contenders", "frozen", "--output", str(path), "--resume"]) == 0


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
TRAINED |= {"peft_lora_half": TRAINED["peft_lora"]} | dict.fromkeys(("accelerated", "peft_peanut"), TRAINED["neat"])


def options_of(**more):
    asked = {"model": "tiny", "targets": "default", "dtype": "float32", "device": "cpu", "threads": 1, "steps": 1}
    return SimpleNamespace(**(asked | more))


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("name", model_contenders.CONTENDERS)
def test_every_contender_trains_the_model_from_the_same_loss(name, targets, monkeypatch):
    monkeypatch.setitem(model_contenders.MODELS, "tiny", TINY)
    run = model_contenders.measure(name, options_of(targets=targets))
    if name in TRAINED:
        assert run["trained"] == TRAINED[name][targets == "all-linear"]
    assert len(run["ms"]) == 1
    assert run["peak_bytes"] > 0


def test_a_model_with_another_loss_is_not_timed(monkeypatch):
    def broken(model, settings, targets):
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        return model

    monkeypatch.setitem(model_contenders.MODELS, "tiny", TINY)
    monkeypatch.setitem(model_contenders.CONTENDERS, "broken", broken)
    with pytest.raises(RuntimeError, match="expected the frozen model's loss"):
        model_contenders.measure("broken", options_of())


def step_of(*ms, peak=None):
    return {"trained": 1, "ms": list(ms), "peak_bytes": peak, "loss": 1.0}


def test_a_contender_that_fails_is_told_and_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    found = {"frozen": step_of(2.0), "neat": {"failed": "no memory"}}
    asked = []
    monkeypatch.setattr(model_step, "_fresh_process", lambda name, options: (asked.append(name), found[name])[1])
    arguments = ["--contenders", "neat", "frozen", "--processes", "2", "--output", str(tmp_path / "out.json")]
    assert model_step.main(arguments) == 1
    assert "failed: no memory" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["runs"] == {"neat": [found["neat"]], "frozen": [found["frozen"]] * 2}
    assert asked == ["neat", "frozen", "frozen"]
    assert list(content["summary"]) == ["frozen"]
    monkeypatch.setitem(found, "neat", step_of(3.0))
    assert model_step.main([*arguments, "--resume"]) == 0
    assert asked[3:] == ["neat", "neat"]
    asked.clear()
    assert model_step.main([*arguments, "--resume", "--steps", "7"]) == 0
    assert asked == ["neat", "frozen"] * 2


def test_the_summary_of_a_model_is_the_median_of_its_processes(tmp_path):
    runs = {
        "frozen": [step_of(2.0, 4.0, 4.0), step_of(5.0), step_of(6.0)],
        "neat": [step_of(5.0, peak=7), step_of(9.0)],
    }
    found = summarize_models(runs, tokens=100)
    assert found["neat"] == {"trained": 1, "ms": 7.0, "min": 5.0, "max": 9.0, "ratio": 7 / 5, "peak_bytes": 7,
                             "tokens_per_second": 1e5 / 7}  # fmt: skip
    assert summarize_models({"neat": runs["neat"]}, 100)["neat"]["ratio"] is None
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a result file of benchmarks\.model_step"):
        read_model_results(tmp_path / "x.json")
