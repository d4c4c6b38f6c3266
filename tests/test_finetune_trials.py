"""Several seeds, a grid of learning rates, and runs that are stopped and gone on with."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from finetune_problem import LABELS, rows, save_model, write_jsonl
from safetensors.torch import load_file
from test_finetune_train import Silent
from torch import nn
from typer.testing import CliRunner

from neat_kernels.cli import app
from neat_kernels.finetune.batches import tokenize
from neat_kernels.finetune.checkpoint import read_state, write_state
from neat_kernels.finetune.data import split_rows
from neat_kernels.finetune.model import Pretrained
from neat_kernels.finetune.settings import METHODS, Settings
from neat_kernels.finetune.train import MethodResult, TrainingError, train_method
from neat_kernels.finetune.trials import TrialFiles, run_trials
from neat_kernels.interrupt import Interrupted, first_interrupt_waits
from neat_kernels.usage import UsageError

CPU = torch.device("cpu")
TIMES = ("step_ms", "tokens_per_second", "peak_bytes")
SMALL = ("--steps", 12, "--batch-size", 8, "--device", "cpu", "--r", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    save_model(folder / "model")
    write_jsonl(folder / "data.jsonl", rows())
    return folder


@pytest.fixture(scope="module")
def bert(folder):
    return Pretrained.find(str(folder / "model"))


@pytest.fixture(scope="module")
def tokens(bert):
    return tokenize(split_rows(rows(), source="test", validation=0.1, test=0.2), bert.tokenizer, 12)


def train(method, settings, bert, tokens, state=None, stop=math.inf):
    """The result without times, and the trained values; `stop` is the number of steps after which it is stopped."""
    kept, progress = {}, Silent()

    def worth(result, model):
        kept.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return True

    result = train_method(
        method, settings, bert, ["query", "value"], tokens, len(LABELS), CPU, progress, worth, state,
        lambda: len(progress.steps) >= stop,
    )  # fmt: skip
    return {name: value for name, value in dataclasses.asdict(result).items() if name not in TIMES}, kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 5, 8, 13])
def test_a_stopped_training_goes_on_bit_by_bit(method, dtype, stop, bert, tokens, tmp_path):
    settings = Settings(r=4, lr=1e-2, steps=14, batch_size=8, dtype=dtype, depth=1, seed=3)
    expected, values = train(method, settings, bert, tokens)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted, match=f"stopped after step {stop} of 14"):
        train(method, settings, bert, tokens, state=state, stop=stop)
    torch.manual_seed(99)  # whatever ran in between
    result, again = train(method, settings, bert, tokens, state=state)
    assert result == expected
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_a_state_that_fits_no_training_is_refused(bert, tokens, tmp_path):
    state = tmp_path / "state.safetensors"
    settings = Settings(r=4, lr=1e-2, steps=14, batch_size=8)
    train("neat", settings, bert, tokens, state=state)
    with pytest.raises(UsageError, match="of other parameters than those that train now"):
        train("neat", dataclasses.replace(settings, r=3), bert, tokens, state=state)
    content = state.read_bytes()
    for broken in (b"", content[:-3], b"x" * 100):
        state.write_bytes(broken)
        with pytest.raises(UsageError, match="is no whole state of a training"):
            train("neat", settings, bert, tokens, state=state)


def test_floats_of_a_state_come_back_with_the_same_bits(tmp_path):
    facts = {"loss": [0.1 + 0.2, 1e-300, math.pi], "nan": math.nan}
    write_state(tmp_path / "a.safetensors", {"x": torch.tensor([1.0, math.inf])}, facts)
    tensors, read = read_state(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], torch.tensor([1.0, math.inf]))
    assert read["loss"] == facts["loss"]
    assert math.isnan(read["nan"])


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_state(path, {"x": torch.ones(2)}, {})

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(path, {"x": torch.zeros(2)}, {})
    assert torch.equal(read_state(path)[0]["x"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def fake(accuracies, calls):
    """A training that reaches what the table says, by learning rate and seed."""

    def train(method, settings, state, worth):
        calls.append((settings.lr, settings.seed))
        accuracy = accuracies[settings.lr]
        if accuracy is None:
            raise TrainingError("not finite")
        result = MethodResult(method, settings.lr, 0.03, 9, 3, [1.0], [(1, accuracy)], seeds=[settings.seed])
        if worth(result, nn.Linear(1, 1)):
            result.test_values = [1.0, float(settings.seed % 2)]
        return result

    return train


def test_the_rate_is_chosen_by_validation_with_the_first_seed(tmp_path):
    calls, kept = [], []
    settings = Settings(lrs=(1e-3, 1e-2, 1e-1, 1.0), seeds=(4, 5, 6), seed=4)
    table = {1e-3: 0.5, 1e-2: 0.7, 1e-1: 0.7, 1.0: None}
    files = TrialFiles(tmp_path, {})
    result = run_trials("neat", settings, files, fake(table, calls), kept.append)
    assert calls == [(1e-3, 4), (1e-2, 4), (1e-1, 4), (1.0, 4), (1e-2, 5), (1e-2, 6)]
    assert len(kept) == 2, "what the best rate so far has trained"
    assert (result.lr, result.seeds) == (1e-2, [4, 5, 6])
    assert result.grid == [(1e-3, 0.5), (1e-2, 0.7), (1e-1, 0.7), (1.0, None)]
    assert result.test_scores == [0.5, 1.0, 0.5]
    assert result.test_values == [1.0, pytest.approx(1 / 3)]
    assert run_trials("neat", settings, files, fake(table, calls), kept.append).test_scores == result.test_scores
    assert len(calls) == 6, "a trial that has a result is not trained again"


def test_a_loss_that_is_finite_at_no_rate_ends_the_run(tmp_path):
    settings = Settings(lrs=(1e-3, 1e-2))
    table = dict.fromkeys(settings.lrs)
    with pytest.raises(TrainingError, match="not finite at any learning rate"):
        run_trials("neat", settings, TrialFiles(tmp_path, {}), fake(table, []), lambda model: None)
    with pytest.raises(TrainingError, match="not finite"):
        run_trials("neat", Settings(lr=1e-3), TrialFiles(tmp_path / "b", {}), fake(table, []), lambda model: None)


def run(folder, output, *arguments):
    files = ("--model", folder / "model", "--data", folder / "data.jsonl", "--output", output)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in ("finetune", *files, *SMALL, *arguments)])


def test_seeds_and_rates_from_the_command_line(folder, tmp_path):
    arguments = ("--method", "probe,neat", "--lr", "1e-3,3e-2", "--seed", "0,1,2")
    result = run(folder, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    for words in ("3, σ ", "Neat in validation at lr 0.001: ", "; chosen "):
        assert words in result.output
    probe, neat = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert probe["seeds"] == neat["seeds"] == [0, 1, 2]
    assert [rate for rate, _ in neat["grid"]] == [rate for rate, _ in probe["grid"]] == [0.001, 0.03]
    assert len(list((tmp_path / "out" / "trials").glob("neat-*.json"))) == 4
    assert not list((tmp_path / "out" / "trials").glob("*.safetensors"))
    assert run(folder, tmp_path / "out", *arguments).exit_code == 2
    assert run(folder, tmp_path / "out", *arguments, "--resume").exit_code == 0


def test_what_is_broken_of_a_run_is_not_gone_on_with(folder, tmp_path):
    arguments = ("--method", "probe,neat", "--lr", "1e-3,1e30", "--steps", 2)
    assert run(folder, tmp_path / "whole", *arguments).exit_code == 0
    trial = "trials/neat-lr0.001-seed0.json"
    for name, content, message in (
        ("trials/run.json", '{"a"', "run.json as the run has written it"),
        ("trials/run.json", "[]", "run.json as the run has written it, got a list"),
        (trial, "", f"{trial} as the run has written it"),
        (trial, '{"method": "neat"}', f"{trial} as the run has written it"),
        ("neat", None, "neat, which the run has left; got none"),
    ):
        output = tmp_path / "out"
        shutil.copytree(tmp_path / "whole", output)
        if content is None:
            shutil.rmtree(output / name)
        else:
            (output / name).write_text(content)
        result = run(folder, output, *arguments, "--resume")
        assert result.exit_code == 2, result.output
        assert message in result.output
        shutil.rmtree(output)
    assert run(folder, tmp_path / "whole", *arguments, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "fast"), "--lr must be a number, or several in a comma list; got 'fast'"),
        (("--lr", "1e-3,1e-3"), "--lr must name each number once"),
        (("--lr", "1e-3,-1"), "--lr must be a positive number, got -1.0"),
        (("--seed", "0.5"), "--seed must be a number"),
        (("--seed", ","), "--seed must name each number once; got none"),
        (("--seed", "0,-1"), "--seed must be at least 0, got -1"),
        (("--resume",), "holds no run that was stopped"),
        (("--resume", "--overwrite"), "give one of the two"),
    ],
)
def test_refused(folder, tmp_path, arguments, message):
    result = run(folder, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def numbers(output):
    """What a run has reached, without what depends on the clock."""
    methods = json.loads((output / "results.json").read_text())["methods"]
    return [{name: value for name, value in method.items() if name not in TIMES} for method in methods]


def test_ctrl_c_and_resume_reach_what_a_whole_run_does(folder, tmp_path):
    arguments = ["--method", "lora,neat", "--steps", "150", "--seed", "0,1"]
    assert run(folder, tmp_path / "whole", *arguments).exit_code == 0
    command = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path / "out"]
    # In the middle of the first training: its state is there, its result is not.
    state = tmp_path / "out" / "trials" / "lora-lr0.003-seed0.safetensors"
    errors = interrupted([*command, *SMALL, *arguments], state)
    assert "The same command with --resume goes on from there" in errors
    assert not (tmp_path / "out" / "results.json").exists()
    other = run(folder, tmp_path / "out", *arguments[:-1], "0,2", "--resume")
    assert other.exit_code == 2
    assert "expected what the run was begun with, seeds [0, 1]; got [0, 2]" in other.output
    resumed = run(folder, tmp_path / "out", *arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")
    for name in (
        "neat/adapter/adapter_model.safetensors",
        "neat/head.safetensors",
        "neat/lora/adapter_model.safetensors",
    ):
        ours, whole = (load_file(tmp_path / run_ / name) for run_ in ("out", "whole"))
        assert all(torch.equal(ours[key], value) for key, value in whole.items())


def interrupted(arguments, path):
    """What `neat-kernels finetune`, stopped by Ctrl-C once a file is there, says on stderr."""
    command = [sys.executable, "-m", "neat_kernels", "finetune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(path, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    return errors


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_the_second_interrupt_interrupts_and_the_handler_from_before_is_put_back():
    def own(number, frame):
        raise AssertionError("not this one")

    # A job in the background of a shell begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, own)
    try:
        with pytest.raises(KeyboardInterrupt), first_interrupt_waits() as stopped:
            assert not stopped()
            signal.raise_signal(signal.SIGINT)
            assert stopped()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
