"""`neat-kernels bench`: what it measures and writes, what it says has changed, and what it refuses."""

import json
import statistics

import pytest
from typer.testing import CliRunner

from neat_kernels.bench import command, presets
from neat_kernels.bench.compare import compare
from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.processes import summarize
from neat_kernels.bench.provenance import ROOT
from neat_kernels.bench.results import Results, read_results
from neat_kernels.cli import app

OLD = ROOT / "benchmarks" / "results" / "layer_ratio-cpu-epyc-avx2.json"
FACTS = {"device": "a CPU", "versions": {"torch": "2.13.0"}, "commit": "abc"}


def run(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    """As much as a preset measures, over as many processes, but only for a moment and on this CPU."""
    monkeypatch.chdir(tmp_path)
    short = presets.Preset(2, 0.01, 300, apart=False, contenders=("frozen", "neat"))
    monkeypatch.setitem(presets.PRESETS, "quick", short)


def case_of(frozen, neat, **more):
    """A case whose processes have these medians in ms."""
    entries = [
        {
            "frozen": {"status": "timed", "adapter_dtype": None, "samples_ms": [one]},
            "neat": {"status": "timed", "adapter_dtype": "float32", "samples_ms": [other]},
        }
        for one, other in zip(frozen, neat, strict=True)
    ]
    runs = [{"tolerance": 1.0, "weight_copies": 1, "contenders": entry} for entry in entries]
    facts = {
        "mode": "training", "shape": "8x16x24x2", "dtype": "float32", "device": "cpu", "threads": 2, "seconds": 0.01,
        "contenders": ["frozen", "neat"],
    }  # fmt: skip
    return {**facts, **more, "runs": runs, "summary": summarize(runs)}


@pytest.fixture
def measured_as(monkeypatch):
    """Let every case be measured with this outcome of ours beside two sound processes of the frozen layer."""

    def let(outcome):
        made = case_of([1.0, 1.0], [2.0, 2.0])["runs"]
        for one in made:
            one["contenders"]["neat"] = outcome
        monkeypatch.setattr(command, "fresh_processes", lambda cases, *rest, **more: [made for _ in cases])

    return let


def write(path, *cases, **facts):
    path.write_text(json.dumps({"provenance": {**FACTS, **facts}, "processes": 3, "cases": cases}))
    return path


def test_a_layer_is_measured_printed_and_written(tmp_path):
    result = run("--device", "cpu", "--shape", "90x24x16", "--shape", "vit-b.query@70", "--r", 2, "--dtype", "fp32",
                 "--threads", 1, "--json", "out.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("forward + backward, fp32, cpu", "inference, features cached", "neat-kernels", "M=90", "768→768, r=2",
                 "median and range of 2 processes", "saved for backward"):  # fmt: skip
        assert word in result.output
    found = read_results(tmp_path / "out.json")
    assert {"device", "versions", "commit", "command", "date"} <= set(found.provenance)
    assert [(case["mode"], case["shape"]) for case in found.cases] == [
        (mode, shape) for mode in ("training", "inference") for shape in ("90x24x16x2", "70x768x768x2")
    ]
    assert all(len(case["runs"]) == 2 for case in found.cases)
    assert {case["threads"] for case in found.cases} == {1}
    again = run("--compare", "out.json", "--json", "again.json")
    assert again.exit_code == 0, again.output
    assert "of 8 figures have changed beyond noise" in again.output
    assert [case["shape"] for case in read_results(tmp_path / "again.json").cases] == [c["shape"] for c in found.cases]


def test_a_wrong_contender_is_not_timed_and_fails_the_command(tmp_path, measured_as):
    measured_as({"status": "wrong", "reason": "relative error against float64: y 1.0e+00 (at most 1e-05)"})
    result = run("--shape", "8x16x24", "--r", 2, "--dtype", "fp32", "--json", "out.json")
    assert result.exit_code == 1
    assert "at most 1e-05" in result.output
    assert "neat" not in read_results(tmp_path / "out.json").cases[0]["summary"]["ms"]


def test_a_dtype_that_the_cpu_cannot_multiply_is_left_out_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "half_gemm_is_native", lambda dtype: False)
    runs = case_of([1.0], [2.0])["runs"]
    monkeypatch.setattr(command, "fresh_processes", lambda cases, *rest, **more: [runs for _ in cases])
    result = run("--device", "cpu", "--shape", "8x16x24", "--r", 2, "--json", "out.json")
    assert "bf16 is left out" in result.output
    assert {case["dtype"] for case in read_results(tmp_path / "out.json").cases} == {"float32"}


def test_who_takes_no_part_is_said(measured_as):
    measured_as({"status": "skipped", "reason": "peft is not installed"})
    result = run("--shape", "8x16x24", "--r", 2, "--dtype", "fp32", "--json", "out.json")
    assert result.exit_code == 0, result.output
    assert "neat-kernels took no part: peft is not installed" in result.output


def test_an_interrupt_keeps_what_was_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(
        presets.PRESETS, "quick", presets.Preset(2, 0.01, 300, apart=True, contenders=("frozen", "neat"))
    )
    calls = []

    def measured(cases, *rest, **more):
        calls.append(cases)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [case_of([1.0, 1.0], [2.0, 2.0])["runs"]]

    monkeypatch.setattr(command, "fresh_processes", measured)
    result = run("--shape", "8x16x24", "--dtype", "fp32", "--json", "out.json")
    assert result.exit_code == 130
    assert "out.json has the 1 cases that were whole" in result.output
    assert len(read_results(tmp_path / "out.json").cases) == 1


class TestCompare:
    def test_beyond_noise_is_farther_apart_than_both_spreads(self, tmp_path):
        old = write(tmp_path / "old.json", case_of([1.0, 1.0, 1.0], [2.0, 2.1, 2.2]))
        within = write(tmp_path / "within.json", case_of([1.0, 1.0, 1.0], [2.25, 2.35, 2.45]))
        beyond = write(tmp_path / "beyond.json", case_of([1.0, 1.0, 1.0], [2.5, 2.6, 2.7]))
        told = run("--compare", old, "--measured", within)
        assert told.exit_code == 0, told.output
        assert "0 of 2 figures have changed beyond noise" in told.output
        told = run("--compare", old, "--measured", beyond)
        assert "1 of 2 figures have changed beyond noise" in told.output
        assert "+23.8 %" in told.output
        assert "2.1 (2–2.2)" in told.output

    def test_ratios_are_taken_within_a_process(self):
        """A machine that was twice as slow has changed the floor's milliseconds and no ratio."""
        results = [Results(FACTS, [case_of([f, f + 0.01], [2 * f, 2 * (f + 0.01)])]) for f in (1.0, 2.0)]
        changes = compare(*results).changes
        assert [(change.contender, change.beyond_noise) for change in changes] == [("frozen", True), ("neat", False)]
        assert changes[1].factor == pytest.approx(1)

    def test_one_process_tells_nothing(self, tmp_path):
        results = [Results(FACTS, [case_of([1.0], [ratio])]) for ratio in (2.0, 4.0)]
        assert [change.beyond_noise for change in compare(*results).changes] == [None, None]
        old, new = (write(tmp_path / f"{ratio}.json", case_of([1.0], [ratio])) for ratio in (2.0, 4.0))
        output = run("--compare", old, "--measured", new).output
        assert "2 figures are of one process, which has no spread" in output
        assert "beyond noise" not in output

    def test_what_only_one_side_has_and_other_versions_are_said(self, tmp_path):
        old = write(tmp_path / "old.json", case_of([1.0, 1.0], [2.0, 2.0]), case_of([1.0, 1.0], [2.0, 2.0], threads=1))
        new = write(tmp_path / "new.json", case_of([1.0, 1.0], [2.0, 2.0]), versions={"torch": "2.14.0"})
        output = run("--compare", old, "--measured", new).output
        assert "1 threads: only in the old results" in output
        assert "torch: 2.13.0 then, 2.14.0 now" in output

    def test_files_from_before_there_were_modes_hold_training(self):
        cases = read_results(OLD).cases
        assert {case["mode"] for case in cases} == {"training"}
        result = run("--compare", OLD, "--measured", OLD)
        assert "0 of 8 figures have changed beyond noise" in result.output

    def test_another_device_and_other_cases_are_refused(self, tmp_path):
        old = write(tmp_path / "old.json", case_of([1.0, 1.0], [2.0, 2.0]))
        other = write(tmp_path / "other.json", case_of([1.0, 1.0], [2.0, 2.0]), device="another CPU")
        result = run("--compare", old, "--measured", other)
        assert result.exit_code == 2
        assert "expected results of one device, got 'a CPU' and 'another CPU'" in result.output
        assert "of a CPU nothing can run here" in run("--compare", old).output
        mode = write(tmp_path / "mode.json", case_of([1.0, 1.0], [2.0, 2.0], mode="inference"))
        assert "expected results with a case in common" in run("--compare", old, "--measured", mode).output


@pytest.mark.parametrize("fault", ["no file", "no json", "no cases", "no floor", "no samples", "shape", "mode"])
def test_a_file_that_is_no_result_is_refused(fault, tmp_path):
    path = write(tmp_path / "x.json", case_of([1.0], [2.0]))
    content = json.loads(path.read_text())
    case = content["cases"][0]
    if fault == "no cases":
        content = {"provenance": FACTS}
    elif fault == "no floor":
        del case["summary"]["ms"]["frozen"]
    elif fault == "no samples":
        case["runs"] = []
    elif fault == "shape":
        case["shape"] = "8x16"
    elif fault == "mode":
        case["mode"] = "sleeping"
    path.write_text("{" if fault == "no json" else json.dumps(content))
    if fault == "no file":
        path.unlink()
    result = run("--compare", path, "--measured", path)
    assert result.exit_code == 2, result.output
    assert "expected a result file of `neat-kernels bench`" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slow",), "the preset must be one of quick, full; got 'slow'"),
        (("--plan", "fused"), "--plan is read with --model only"),
        (("--measured", OLD), "--measured is read with --model or --compare"),
        (("--compare", OLD, "--measured", OLD, "--threads", 2), "--threads is not read with --measured"),
        (("--compare", OLD, "--dtype", "fp32"), "--dtype is not read with --compare"),
        (("--device", "toaster"), "--device must be cpu or cuda"),
        (("--device", "H200"), "--device must be cpu or cuda without --model; got 'H200'"),
        (("--device", "meta"), "--device must be cpu or cuda"),
        (("--dtype", "int8"), "--dtype must be one of fp32, bf16, fp16"),
        (("--r", 4), "--r is read with --shape only"),
        (("--shape", "8x16x24", "--r", 0), "--r must be at least 1, got 0"),
        (("--shape", "8x16"), "--shape must be TOKENSxINxOUT or LAYER@TOKENS"),
        (("--shape", "0x16x16"), "integers, got '0x16x16x16'"),
        (("--shape", "llama-3-8b.q@16"), "did you mean llama-3-8b.q_proj?"),
        (("--threads", 0), "--threads must be at least 1, got 0"),
        (("--overwrite",), "--overwrite is read with --json only"),
        (("--json", "/no/such/folder/x.json"), "--json must be a file in a folder that is there"),
    ],
)
def test_refused_before_anything_is_measured(arguments, message, monkeypatch, tmp_path):
    monkeypatch.delattr(command, "fresh_processes")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_there_is_kept(tmp_path, monkeypatch):
    monkeypatch.delattr(command, "fresh_processes")
    (tmp_path / "x.json").write_text("mine")
    assert "is there already" in run("--json", "x.json").output
    assert (tmp_path / "x.json").read_text() == "mine"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_presets_name_what_there_is(preset, device, monkeypatch):
    import torch

    monkeypatch.undo()
    chosen = presets.PRESETS[preset]
    assert set(chosen.contenders) <= set(CONTENDERS)
    layers = presets.layers_of(preset, torch.device(device))
    made = presets.cases(layers, ["bfloat16"], torch.device(device), 2, chosen)
    assert {case["mode"] for case in made} == {"training", "inference"}
    assert min(int(case["shape"].split("x")[0]) for case in made) == 1
    assert len({(case["mode"], case["shape"]) for case in made}) == len(made)
    assert all("unsloth_lora" not in case["contenders"] for case in made)


def test_a_summary_is_what_its_runs_say():
    case = case_of([1.0, 2.0, 4.0], [2.0, 5.0, 9.0])
    assert case["summary"]["ratios"]["neat/frozen"] == {"median": 2.25, "min": 2.0, "max": 2.5}
    assert case["summary"]["ms"]["neat"] == statistics.median([2.0, 5.0, 9.0])
