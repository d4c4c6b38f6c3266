"""`neat-kernels finetune --task lm`: what it tells and leaves, going on after Ctrl-C, and what it refuses."""

import json
import math

import lm_problem as problem
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_finetune_trials import interrupted, numbers
from typer.testing import CliRunner

import neat_kernels as nk
from neat_kernels.cli import app
from neat_kernels.finetune import tasks
from neat_kernels.finetune.defaults import LM_LEARNING_RATES
from neat_kernels.finetune.lm_batches import Encoder
from neat_kernels.finetune.lm_data import load_documents
from neat_kernels.finetune.model import LanguageModel, Pretrained
from neat_kernels.finetune.settings import Settings

CPU = torch.device("cpu")
METHODS = tuple(LM_LEARNING_RATES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return problem.save_everything(tmp_path_factory.mktemp("problem"))


SMALL = ("--steps", 10, "--batch-size", 4, "--max-length", 32, "--device", "cpu", "--r", 2, "--lr", "1e-2")


def run(folder, output, *arguments, kind="llama", data="texts.txt"):
    files = ("--model", folder / kind, "--data", folder / data, "--output", output)
    arguments = ("finetune", "--task", "lm", *files, *SMALL, *arguments)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("texts.txt", ()),
        ("prompts.jsonl", ("--prompt-column", "q")),
        ("chats.jsonl", ("--messages-column", "messages")),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_command_from_end_to_end(kind, data, options, folder, tmp_path):
    output = tmp_path / "out"
    result = run(folder, output, *options, kind=kind, data=data)
    assert result.exit_code == 0, result.output
    content = json.loads((output / "results.json").read_text())
    assert [method["method"] for method in content["methods"]] == ["lora", "neat"]
    assert content["data"]["packed"] == (kind == "llama")
    assert all(math.isclose(m["test_perplexity"], math.exp(m["test_loss"])) for m in content["methods"])
    assert content["settings"]["task"] == "lm"
    packing = "packed into" if kind == "llama" else "one text a row, not packed: in a packed row the logits differ"
    for words in (packing, "training tokens are learned", "validation loss", "perplexity", "Loss on 22 test texts"):
        assert words in result.output
    page = (output / "report.html").read_text()
    assert "Perplexity" in page
    assert "validation loss" in page


@pytest.fixture(scope="module")
def left(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("left") / "out"
    result = run(folder, output, "--method", ",".join(METHODS))
    assert result.exit_code == 0, result.output
    return output, result.output


def reload(output, method):
    """The models that the lines of a run load, as they stand there."""
    found, told = [], json.loads((output / method / "language_model.json").read_text())
    names = {"transformers": transformers, "peft": peft, "neat_kernels": nk}
    first = []
    for line in told["load"]:
        if line.startswith("model = "):
            first.append(line)
            continue
        for way in line.split(" as LoRA")[0].split(", or "):
            exec("\n".join(first), names)
            found.append(eval(way, names).eval())
    return found, told["load"]


@pytest.mark.parametrize(("method", "ways"), [("lora", 2), ("neat", 3), ("full", 1)])
def test_what_is_left_is_loaded_as_the_run_says(left, folder, method, ways):
    output, told = left
    models, lines = reload(output, method)
    assert len(models) == ways
    assert all(line in told for line in lines)
    ids = torch.randint(6, 42, (2, 9))
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")(ids).logits
        logits = [model(ids).logits for model in models]
    assert not torch.allclose(logits[0], base, atol=1e-4)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5 * logits[0].abs().max().item())
    if method == "full":
        again = transformers.AutoTokenizer.from_pretrained(output / "full" / "model")
        assert again("cat0 dog0")["input_ids"] == problem.tokenizer()("cat0 dog0")["input_ids"]


def test_the_adapters_say_that_they_are_of_a_causal_language_model(left):
    for name in ("neat/adapter", "neat/lora", "lora/adapter"):
        assert json.loads((left[0] / name / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_test_loss_is_that_of_the_adapter_that_is_left(left, folder):
    output, _ = left
    (models, _), content = reload(output, "neat"), json.loads((output / "results.json").read_text())
    pretrained = Pretrained.find(str(folder / "llama"), "lm")
    settings = Settings(task="lm", model="m", data=folder / "texts.txt", methods=("neat",))
    test = Encoder(pretrained.tokenizer, 32, 64).split(load_documents(settings).test)
    with torch.no_grad():
        scores = LanguageModel(models[0]).scores(test.batch(range(len(test)), CPU))
    loss = sum(value for value, _ in scores) / sum(weight for _, weight in scores)
    neat = next(method for method in content["methods"] if method["method"] == "neat")
    assert loss == pytest.approx(neat["test_loss"], rel=1e-5)


def test_ctrl_c_and_resume_reach_what_a_whole_run_does(folder, tmp_path):
    arguments = ["--steps", "150", "--seed", "0,1"]
    assert run(folder, tmp_path / "whole", *arguments).exit_code == 0
    command = ["--task", "lm", "--model", folder / "llama", "--data", folder / "texts.txt"]
    command += ["--output", tmp_path / "out", *SMALL, *arguments]
    interrupted(command, tmp_path / "out" / "trials" / "lora-lr0.01-seed0.safetensors")
    assert not (tmp_path / "out" / "results.json").exists()
    other = run(folder, tmp_path / "out", *arguments, "--max-length", 16, "--resume")
    assert other.exit_code == 2
    assert "expected what the run was begun with, max_length 32; got 16" in other.output
    resumed = run(folder, tmp_path / "out", *arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")
    for name in ("neat/adapter/adapter_model.safetensors", "neat/lora/adapter_model.safetensors"):
        ours, whole = (load_file(tmp_path / run_ / name) for run_ in ("out", "whole"))
        assert all(torch.equal(ours[key], value) for key, value in whole.items())


def test_a_run_goes_on_only_with_the_same_rows(left, folder, monkeypatch):
    output, _ = left
    assert run(folder, output, "--method", ",".join(METHODS), "--resume").exit_code == 0
    monkeypatch.setattr(tasks, "why_not_packed", lambda *arguments: "another version of transformers")
    result = run(folder, output, "--method", ",".join(METHODS), "--resume")
    assert result.exit_code == 2
    assert "expected what the run was begun with, packed True; got False" in result.output


REFUSED = {
    "text column": (("--text-column", "text"), "texts.txt is text without columns: expected no --text-column, got one"),
    "task": (("--task", "seq2seq"), "--task must be one of classify, lm; got 'seq2seq'"),
    "probe": (("--method", "probe,neat"), "--method of --task lm must be one of lora, neat, full; got 'probe'"),
    "label": (("--label-column", "label"), "--label-column is read by --task classify only; --task is lm"),
    "pair": (("--pair-column", "b"), "--pair-column is read by --task classify only; --task is lm"),
    "both": (("--prompt-column", "a", "--messages-column", "b"), "expected no --prompt-column beside it, got one"),
    "chat": (("--text-column", "a", "--messages-column", "b"), "expected no --text-column beside it, got one"),
    "columns": (("--text-column", "a", "--prompt-column", "a"), "must differ, got a, a"),
    "length": (("--max-length", "65"), "--max-length must be at most 64 for this model, got 65"),
    "output layer": (
        ("--target-modules", "q_proj,lm_head"),
        "expected layers below the output layer, got 'lm_head', which it is",
    ),
    "targets": (("--target-modules", "querry"), "no module is called 'querry'"),
    "not linear": (("--target-modules", "input_layernorm"), "Neat cannot be put into this model"),
    "batch": (("--batch-size", "99"), "--batch-size must be at most the number of training rows, 29; got 99"),
    "prompt": (("--prompt-column", "q"), "texts.txt is text without columns: expected no --prompt-column, got 'q'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_trained(case, folder, tmp_path):
    arguments, message = REFUSED[case]
    result = run(folder, tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 2
    assert "expected to be started as one process, got WORLD_SIZE=2" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [(), ("--model",), ("--data",)])
def test_a_language_model_needs_a_model_and_data(folder, given):
    paths = {"--model": folder / "llama", "--data": folder / "texts.txt"}
    files = [str(part) for name in given for part in (name, paths[name])]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["finetune", "--task", "lm", *files])
    assert result.exit_code == 2
    missing = "--data" if given == ("--model",) else "--model"
    assert f"--task lm has no default model or data: expected {missing}, got none" in result.output


@pytest.mark.parametrize("option", ["--prompt-column", "--messages-column"])
def test_columns_of_a_language_model_are_refused_for_classification(folder, option):
    files = ["--model", str(folder / "llama"), "--data", str(folder / "prompts.jsonl")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["finetune", *files, option, "q"])
    assert result.exit_code == 2
    assert f"{option} is read by --task lm only; --task is classify" in result.output


def refused(model, folder, tmp_path):
    result = run(folder, tmp_path / "out", "--target-modules", "all-linear", kind=model)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out").exists()
    return result.output


def test_models_that_are_no_causal_language_models_are_refused(folder, tmp_path):
    assert "logits depend on the tokens after them" in refused(folder / "bert", folder, tmp_path)
    problem.tokenizer().save_pretrained(tmp_path / "encoder-decoder")
    transformers.T5Config().save_pretrained(tmp_path / "encoder-decoder")
    output = refused(tmp_path / "encoder-decoder", folder, tmp_path)
    assert "--model must be a causal language model" in output
    assert "is an encoder-decoder" in output
    problem.tokenizer().save_pretrained(tmp_path / "encoder")
    transformers.MPNetConfig().save_pretrained(tmp_path / "encoder")
    assert "(mpnet) transformers makes none" in refused(tmp_path / "encoder", folder, tmp_path)
    problem.tokenizer().save_pretrained(tmp_path / "headless")
    transformers.AutoModel.from_config(problem.CONFIGS["llama"]).save_pretrained(tmp_path / "headless")
    output = refused(tmp_path / "headless", folder, tmp_path)
    assert "expected the weights of a whole language model, got none of lm_head.weight" in output
    assert "Neat cannot be put into this model" in refused(folder / "falcon", folder, tmp_path)


def test_chat_without_marks_is_refused_before_the_data_is_read(folder, tmp_path):
    problem.save_model(tmp_path / "model", chat_template="{{ messages[0].content }}")
    result = run(folder, tmp_path / "out", "--messages-column", "messages", kind=tmp_path / "model", data="none.jsonl")
    assert result.exit_code == 2
    assert "marks the assistant's turns by {% generation %}" in result.output
    assert not (tmp_path / "out").exists()
