"""neat-kernels inspect, export and merge, and what a fine-tuning run leaves behind."""

import html
import json
import math
import os
import shutil

import peft
import pytest
import torch
import transformers
from finetune_problem import LABELS, rows, save_model, write_jsonl
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import neat_kernels as nk
from neat_kernels.cli import app
from neat_kernels.finetune import artifacts, load_classifier
from neat_kernels.finetune.batches import Batch
from neat_kernels.finetune.methods import prepare
from neat_kernels.finetune.model import Pretrained, TextClassifier
from neat_kernels.finetune.settings import Settings
from neat_kernels.usage import UsageError
from tests.adapter_problem import adapted, agree, base, full_disk, logits, shake

METHODS = ("probe", "lora", "neat", "full")


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def told(result, *words):
    """The command failed, plainly."""
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: ")
    for word in words:
        assert word in result.output


@pytest.fixture
def saved(tmp_path):
    """A tiny Llama on the disk, and an adapter of it that names it."""
    base("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    shake(nk.apply_neat(model, nk.NeatConfig(r=5, target_modules=["q_proj", "down_proj"], activation="sin2pi")))
    nk.save_adapter(model, tmp_path / "adapter")
    return model


def test_inspect(tmp_path, saved):
    result = run("inspect", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    for words in (
        "NEAT",
        "sin2pi",
        str(tmp_path / "base"),
        "hashes of 4 base weights",
        "self_attn.q_proj.neat_A.weight",
    ):
        assert words in result.output
    assert "5 × 32" in result.output
    told(run("inspect", tmp_path), "expected a file adapter_config.json")


@pytest.mark.parametrize(
    ("options", "readers"),
    [
        ({}, "neat_kernels.from_lora, peft.PeftModel.from_pretrained"),
        ({"use_dora": True}, "peft.PeftModel.from_pretrained alone; "),
    ],
)
def test_inspect_says_who_loads_a_lora_adapter(tmp_path, options, readers):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    peft.get_peft_model(base("llama"), config).save_pretrained(tmp_path / "adapter")
    result = run("inspect", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert readers in result.output
    assert ("got use_dora" in " ".join(result.output.split())) == bool(options)


def test_inspect_reads_every_value(tmp_path, saved):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name][-1, -1] = math.nan
    save_file(tensors, path)
    told(run("inspect", tmp_path / "adapter"), "expected finite values")


def test_inspect_leaves_the_terminal_alone(tmp_path, saved):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.[/red]\x1b[2J": torch.ones(1)}, path)
    edited = {**json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()), "task_type": "[bold]\x07"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(edited))
    result = run("inspect", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "[/red]?[2J" in result.output
    assert "[bold]?" in result.output
    assert "\x1b" not in result.output


def test_merge_in_another_dtype_rounds_once(tmp_path, saved):
    result = run("merge", tmp_path / "adapter", tmp_path / "merged", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    layer = saved.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(
        merged.model.layers[0].self_attn.q_proj.weight, layer.weight + layer.delta_weight(), rtol=1e-6, atol=1e-7
    )


def test_export(tmp_path, saved):
    result = run("export", tmp_path / "adapter", tmp_path / "lora", "--pad-to", "vllm")
    assert result.exit_code == 0, result.output
    assert "LORA, rank 8, 4 layers" in result.output
    assert "Warning" not in result.output, "the base is the same in bfloat16 as in float32"
    _, batch = adapted("llama")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    agree(logits(peft.PeftModel.from_pretrained(reread, tmp_path / "lora"), batch), logits(saved, batch))
    assert "LORA" in run("inspect", tmp_path / "lora").output
    told(run("export", tmp_path / "adapter", tmp_path / "lora"), "is not empty")
    assert run("export", tmp_path / "adapter", tmp_path / "lora", "--overwrite", "--pad-to", 7).exit_code == 0
    told(run("export", tmp_path / "adapter", tmp_path / "x", "--pad-to", 3), "expected at least the rank")
    for rank in ("0", "-1", "²", "eight"):
        told(run("export", tmp_path / "adapter", tmp_path / "x", "--pad-to", rank), "expected a rank, 'vllm' or None")
    told(run("export", tmp_path / "lora", tmp_path / "x"), "expected peft_type PEANUT or NEAT, got 'LORA'")
    told(run("export", tmp_path / "adapter", tmp_path / "x", "--model", tmp_path / "none"), "cannot be loaded")
    assert not (tmp_path / "x").exists()


def test_merge(tmp_path, saved):
    result = run("merge", tmp_path / "adapter", tmp_path / "merged", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    _, batch = adapted("llama")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    agree(logits(merged, batch), logits(saved, batch))
    half = run("merge", tmp_path / "adapter", tmp_path / "half", "--rounding", "stochastic", "--seed", 1)
    assert half.exit_code == 0, half.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    told(run("merge", tmp_path / "adapter", tmp_path / "merged"), "is not empty")
    told(run("merge", tmp_path / "adapter", tmp_path / "x", "--dtype", "int8"), "expected float32, bfloat16, float16")
    told(run("merge", tmp_path / "adapter", tmp_path / "x", "--rounding", "up"), "rounding must be one of")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("room", [100, 3000])
def test_a_disk_that_fills_up(tmp_path, saved, command, room):
    there = sorted(os.listdir(tmp_path))
    with full_disk(room):
        result = run(command, tmp_path / "adapter", tmp_path / "x")
    told(result)
    assert "File too large" in result.output
    assert sorted(os.listdir(tmp_path)) == there


def test_a_base_that_no_library_of_ours_has_is_not_imported(tmp_path, saved):
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    for mapping in (
        {"base_model_class": "system", "parent_library": "os"},
        {"base_model_class": "logging"},
        "os",
        None,
    ):
        path.write_text(json.dumps({**values, "auto_mapping": mapping, "task_type": None}))
        told(run("export", tmp_path / "adapter", tmp_path / "x"), "expected a base model", "task_type None")


def test_a_base_that_would_have_to_be_unpickled(tmp_path, saved):
    state = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    told(run("export", tmp_path / "adapter", tmp_path / "x"), "cannot be loaded")


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a run of every method leaves."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model")
    write_jsonl(folder / "data.jsonl", rows())
    command = ["finetune", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", folder / "out"]
    command += ["--method", ",".join(METHODS), "--steps", 60, "--batch-size", 16, "--device", "cpu", "--depth", 1]
    result = run(*command)
    assert result.exit_code == 0, result.output
    return folder, result.output, command


@pytest.mark.parametrize("method", METHODS)
def test_each_method_leaves_a_classifier(left, method):
    folder, _, _ = left
    classifier = load_classifier(folder / "out" / method)
    texts, labels = zip(*rows(), strict=True)
    right = sum(a == b for a, b in zip(classifier(texts), labels, strict=True)) / len(labels)
    assert right > 0.9
    probabilities = classifier.probabilities(texts[:5])
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5))
    assert classifier([]) == []


@pytest.mark.parametrize(("method", "ways"), [("probe", 0), ("lora", 2), ("neat", 3), ("full", 1)])
def test_what_is_left_is_loaded_as_the_run_says(left, method, ways):
    folder, output, _ = left
    lines = json.loads((folder / "out" / method / "classifier.json").read_text())["load"]
    assert all(line in output for line in lines)
    report = html.unescape((folder / "out" / "report.html").read_text())
    assert all(line in report for line in lines)
    names = {"neat_kernels": nk, "peft": peft, "transformers": transformers}
    classifier = eval(lines[0].removesuffix(" labels texts"), names)
    ids = torch.tensor([[2, 5, 9, 3]])
    expected = classifier.model.backbone(ids).last_hidden_state
    calls = [way for line in lines[1:] if "model = " not in line for way in line.split(" as LoRA")[0].split(", or ")]
    assert len(calls) == ways
    for call in calls:
        exec("\n".join(line for line in lines if line.startswith("model = ")), names)
        agree(eval(call, names).eval()(ids).last_hidden_state, expected)


def test_an_earlier_run_is_replaced_only_when_asked(left):
    folder, _, command = left
    for name in ("results.json", "curves.png", "report.html"):
        os.rename(folder / "out" / name, folder / name)
    result = run(*command)
    assert result.exit_code == 2
    assert "holds probe of an earlier run" in result.output
    assert run(*command, "--overwrite", "--seed", 1).exit_code == 0
    assert load_classifier(folder / "out" / "neat")(["cat1 cat2 cat3"]) == ["animal"]


def test_an_interrupted_replacement_changes_nothing(left, monkeypatch, tmp_path):
    shutil.copytree(left[0] / "out" / "probe", tmp_path / "probe")
    before = load_classifier(tmp_path / "probe").probabilities(["cat1 dog2"])

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(artifacts, "write_tensors", full)
    model = TextClassifier(nn.Identity(), 32, 3, seed=0)
    with pytest.raises(OSError, match="No space left"):
        artifacts.save_trained(tmp_path / "probe", "probe", model, artifacts.Task(None, LABELS, 8), None, True)
    nn.init.constant_(model.head.weight, float("nan"))
    monkeypatch.undo()
    with pytest.raises(nk.AdapterError, match=r"head\.weight: expected finite values"):
        artifacts.save_trained(tmp_path / "probe", "probe", model, artifacts.Task(None, LABELS, 8), None, True)
    assert torch.equal(load_classifier(tmp_path / "probe").probabilities(["cat1 dog2"]), before)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_disk_that_fills_up_when_a_method_is_written(left, tmp_path, method):
    folder, _, _ = left
    shutil.copytree(folder / "out" / method, tmp_path / method)
    before = load_classifier(tmp_path / method).probabilities(["cat1 dog2"])
    pretrained = Pretrained.find(str(folder / "model"))
    backbone = prepare(method, pretrained.load(torch.float32), Settings(), ("query", "value"))
    model = shake(TextClassifier(backbone, 32, 3, seed=0))
    batch = Batch({"input_ids": torch.ones(1, 3, dtype=torch.long)}, torch.zeros(1), 3)
    with full_disk(7000), pytest.raises(OSError, match=r"cannot be written: .*File too large"):
        artifacts.save_trained(tmp_path / method, method, model, artifacts.Task(None, LABELS, 8), batch, True)
    assert os.listdir(tmp_path) == [method]
    assert torch.equal(load_classifier(tmp_path / method).probabilities(["cat1 dog2"]), before)


@pytest.mark.parametrize("name", ["notes.txt", "model/notes/thesis.txt", "model/pytorch_model.bin"])
def test_files_that_are_not_of_a_run_are_not_replaced(left, tmp_path, name):
    shutil.copytree(left[0] / "out" / "full", tmp_path / "full")
    path = tmp_path / "full" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    model = TextClassifier(nn.Identity(), 32, 3, seed=0)
    with pytest.raises(nk.AdapterError, match="expected nothing but what an earlier run has left"):
        artifacts.save_trained(tmp_path / "full", "full", model, artifacts.Task(None, LABELS, 8), None, True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classifier.json", b"{}"),
        ("classifier.json", b'{"format": 9}'),
        ("head.safetensors", b"x"),
        ("head.safetensors", None),
    ],
)
def test_a_broken_classifier_is_refused(left, tmp_path, name, content):
    shutil.copytree(left[0] / "out" / "probe", tmp_path / "probe")
    if content is None:
        (tmp_path / "probe" / name).unlink()
    else:
        (tmp_path / "probe" / name).write_bytes(content)
    with pytest.raises(UsageError, match="expected"):
        load_classifier(tmp_path / "probe")
    with pytest.raises(UsageError, match="expected a whole classifier"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_that_is_not_finite_is_refused(left, tmp_path, value):
    shutil.copytree(left[0] / "out" / "probe", tmp_path / "probe")
    head = load_file(tmp_path / "probe" / "head.safetensors")
    head["weight"][0, 0] = value
    save_file(head, tmp_path / "probe" / "head.safetensors")
    with pytest.raises(UsageError, match="expected the weight and bias of a head, got values that are not finite in w"):
        load_classifier(tmp_path / "probe")


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"max_length": 65}, "expected max_length up to 64, got 65"), ({"labels": ["a", "b"]}, "size mismatch")],
)
def test_a_classifier_that_does_not_fit_its_model_is_refused(left, tmp_path, changes, match):
    shutil.copytree(left[0] / "out" / "probe", tmp_path / "probe")
    path = tmp_path / "probe" / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=match):
        load_classifier(tmp_path / "probe")


@pytest.mark.parametrize("method", ["probe", "neat"])
def test_a_pickle_that_a_classifier_names_is_not_opened(left, tmp_path, method):
    folder, _, _ = left
    shutil.copytree(folder / "model", tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    shutil.copytree(folder / "out" / method, tmp_path / method)
    path = tmp_path / method / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": str(tmp_path / "model")}))
    with pytest.raises(UsageError, match="has no weights that can be loaded"):
        load_classifier(tmp_path / method)
    asked = load_classifier(tmp_path / method, model=str(tmp_path / "model")).probabilities(["cat1 dog2"])
    assert torch.equal(asked, load_classifier(folder / "out" / method).probabilities(["cat1 dog2"]))
