"""Language models from end to end: packed texts kept apart, training, measures, resuming, what is left behind."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import lm_problem as problem
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_finetune_train import Silent
from test_finetune_trials import numbers, wait_for
from torch import nn
from typer.testing import CliRunner

import neat_kernels as nk
from neat_kernels.cli import app
from neat_kernels.finetune.batches import TaskTokens
from neat_kernels.finetune.defaults import LM_LEARNING_RATES
from neat_kernels.finetune.interrupt import Interrupted
from neat_kernels.finetune.lm_batches import Encoder
from neat_kernels.finetune.lm_check import why_not_packed
from neat_kernels.finetune.lm_data import Document, load_documents
from neat_kernels.finetune.measure import ACCURACY, LOSS, half_width, mean, perplexity
from neat_kernels.finetune.model import LanguageModel, Pretrained
from neat_kernels.finetune.report import comparisons, draw_curves, perplexities, results_json, results_table
from neat_kernels.finetune.settings import Settings, UsageError
from neat_kernels.finetune.train import MethodResult, Trainer, TrainingError, train_method
from neat_kernels.finetune.trials import TrialFiles, run_trials

CPU = torch.device("cpu")
METHODS = tuple(LM_LEARNING_RATES)
SETTINGS = Settings(task="lm", model="m", data="d", methods=METHODS, r=4, lr=1e-2, steps=30, batch_size=4)
TIMES = ("step_ms", "tokens_per_second", "peak_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    for kind in problem.CONFIGS:
        problem.save_model(folder / kind, kind, chat_template=problem.CHAT)
    texts = problem.texts()
    (folder / "texts.txt").write_text("\n\n".join(texts))
    problem.write_jsonl(folder / "prompts.jsonl", [{"q": t.split()[0], "text": " ".join(t.split()[1:])} for t in texts])
    problem.write_jsonl(
        folder / "chats.jsonl",
        [{"messages": [{"role": "user", "content": t.split()[0]}, {"role": "assistant", "content": t}]} for t in texts],
    )
    return folder


@pytest.fixture(scope="module")
def llama(folder):
    return Pretrained.find(str(folder / "llama"), "lm")


def encoded(tokenizer, texts=None, length=32):
    return Encoder(tokenizer, length, 64).split([Document(text) for text in texts or problem.texts()])


@pytest.fixture(scope="module")
def tokens(llama):
    texts = problem.texts()
    train, validation, test = (encoded(llama.tokenizer, part) for part in (texts[:80], texts[80:95], texts[95:]))
    return TaskTokens(train.pack(32), validation, test, 32, 0.0)


def shaken(pretrained, dtype=torch.float32):
    """The model with larger weights, so that what texts have to do with each other shows."""
    torch.manual_seed(0)
    model = pretrained.load(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


PACKED = {"llama": True, "gpt2": True, "opt": False, "bloom": False, "falcon": False, "mamba": False}


@pytest.mark.parametrize("kind", PACKED)
def test_texts_are_packed_only_where_the_model_keeps_them_apart(kind, folder):
    pretrained = Pretrained.find(str(folder / kind), "lm")
    for model in (pretrained.load(torch.float32), shaken(pretrained)):
        reason = why_not_packed(model, encoded(pretrained.tokenizer), 64, CPU)
        assert (reason is None) == PACKED[kind]
        assert PACKED[kind] or "in a packed row the logits differ by" in reason


def test_the_rounding_of_half_dtypes_is_no_leak_and_does_not_hide_one(folder):
    for dtype in (torch.bfloat16, torch.float16):
        for kind in ("llama", "gpt2", "opt", "falcon"):
            pretrained = Pretrained.find(str(folder / kind), "lm")
            reason = why_not_packed(shaken(pretrained, dtype), encoded(pretrained.tokenizer), 64, CPU)
            assert (reason is None) == PACKED[kind], (kind, dtype)


def test_a_model_that_takes_no_positions_is_not_packed(llama):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama.load(torch.float32)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return self.inner(input_ids, attention_mask, use_cache=use_cache)

    assert why_not_packed(Wrapped(), encoded(llama.tokenizer), 64, CPU) == "the model takes no positions"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(folder, dtype):
    pretrained = Pretrained.find(str(folder / "bert"), "lm")
    with pytest.raises(UsageError, match=r"logits depend on the tokens after them \(BertLMHeadModel\)"):
        why_not_packed(shaken(pretrained, dtype), encoded(pretrained.tokenizer), 64, CPU)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packing_changes_neither_the_loss_nor_its_gradient(kind, folder):
    pretrained = Pretrained.find(str(folder / kind), "lm")
    rows = encoded(pretrained.tokenizer, problem.texts()[:12])
    packed = rows.pack(32)
    assert len(packed) < len(rows)
    results = []
    for tokens in (rows, packed):
        model = LanguageModel(shaken(pretrained).double()).eval()
        loss = model.loss(tokens.batch(range(len(tokens)), CPU))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (alone, gradients), (together, packed_gradients) = results
    torch.testing.assert_close(together, alone)
    # The output layer's weight is GPT-2's embedding too.
    torch.testing.assert_close(packed_gradients, gradients)


def test_the_loss_is_that_of_transformers_over_the_texts_one_by_one(llama):
    documents = [Document("dog0 dog1 dog2", prompt="cat0 cat1"), Document("tree1 tree2")]
    tokens = Encoder(llama.tokenizer, 32, 64).split(documents)
    backbone = shaken(llama).eval()
    sums, counts = [], []
    for piece in tokens.pieces:
        labels = piece.labels[None]
        counts.append((labels[:, 1:] != -100).sum().item())
        sums.append(backbone(piece.ids[None], labels=labels).loss.item() * counts[-1])
    assert counts == [4, 3]
    model = LanguageModel(backbone)
    batch = tokens.batch([0, 1], CPU)
    assert model.loss(batch).item() == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    for (value, weight), expected, count in zip(model.scores(batch), sums, counts, strict=True):
        assert (value, weight) == (pytest.approx(expected, rel=1e-5), count)


def test_a_text_in_several_pieces_is_measured_as_one(llama):
    tokens = encoded(llama.tokenizer, [" ".join(["cat0", "cat1"] * 12), "dog0 dog1"], length=8)
    assert len(tokens.pieces) > 3
    trainer = Trainer(LanguageModel(llama.load(torch.float32)), "full", SETTINGS, CPU)
    values, weights = trainer.scores(tokens)
    # 24 words between <s> and </s> in four pieces, whose first tokens have nothing before them; and 2 words.
    assert sorted(weights) == [3, 22]
    assert all(3 < value < 6 for value in values)


def train(method, pretrained, tokens, settings=SETTINGS, state=None, stop=math.inf):
    kept, progress = {}, Silent()

    def worth(result, model):
        kept.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return True

    result = train_method(
        method, settings, pretrained, pretrained.default_targets(), tokens, None, CPU, progress, worth, state,
        lambda: len(progress.steps) >= stop,
    )  # fmt: skip
    return result, kept


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_is_measured_by_its_loss(method, llama, tokens):
    result, trained = train(method, llama, tokens)
    assert result.measure == "loss"
    assert result.validation[-1][1] < result.validation[0][1] < math.log(64)
    assert (result.head, result.head_lr) == (0, None)
    assert result.trainable == sum(p.numel() for p in trained.values())
    assert len(result.test_values) == len(result.test_weights) == len(tokens.test)
    assert result.test_score == pytest.approx(result.validation[-1][1], rel=0.15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_dtypes(method, dtype, llama, tokens):
    result, trained = train(method, llama, tokens, dataclasses.replace(SETTINGS, dtype=dtype))
    assert result.validation[-1][1] < result.validation[0][1]
    assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 6, 29])
def test_a_stopped_training_goes_on_bit_by_bit(method, stop, llama, tokens, tmp_path):
    settings = dataclasses.replace(SETTINGS, seed=3)
    expected, values = train(method, llama, tokens, settings)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted, match=f"stopped after step {stop} of 30"):
        train(method, llama, tokens, settings, state, stop)
    torch.manual_seed(99)
    result, again = train(method, llama, tokens, settings, state)
    plain, whole = ({k: v for k, v in dataclasses.asdict(one).items() if k not in TIMES} for one in (result, expected))
    assert plain == whole
    assert again.keys() == values.keys()
    assert all(torch.equal(again[name], value) for name, value in values.items())


def fake(losses):
    def train(method, settings, state, worth):
        if losses[settings.lr] is None:
            raise TrainingError("not finite")
        result = MethodResult(method, settings.lr, None, 9, 0, [1.0], [(1, losses[settings.lr])], measure="loss")
        if worth(result, nn.Linear(1, 1)):
            result.test_values, result.test_weights = [settings.lr, 2.0], [1.0, 3.0]
        return result

    return train


@pytest.mark.parametrize("order", [(1e-3, 1e-2, 1e-1, 1.0), (1.0, 1e-1, 1e-2, 1e-3)])
def test_the_rate_with_the_lowest_loss_in_validation_is_chosen(tmp_path, order):
    losses, kept = {1e-3: 2.0, 1e-2: 0.5, 1e-1: 0.5, 1.0: None}, []
    settings = dataclasses.replace(SETTINGS, lr=None, lrs=order)
    result = run_trials("neat", settings, TrialFiles(tmp_path, {}), fake(losses), kept.append)
    assert result.lr == 1e-2
    assert dict(result.grid) == losses
    assert result.test_score == (1e-2 + 6.0) / 4


def test_a_validation_loss_that_is_not_finite_ends_the_training(llama, tokens):
    with pytest.raises(TrainingError, match="full: the loss is"):
        train("full", llama, tokens, dataclasses.replace(SETTINGS, lr=1e30))


def test_measures():
    assert (ACCURACY.merit(0.7), LOSS.merit(0.7)) == (0.7, -0.7)
    assert LOSS.merit(math.nan) == -math.inf
    assert mean([1.0, 3.0], [3.0, 1.0]) == 1.5
    values = [0.0, 1.0, 1.0, 1.0]
    assert half_width(values, [2.0] * 4) == pytest.approx(half_width(values))
    # The second text has all the weight, so that the first one's value says nothing.
    assert half_width([5.0, 1.0], [0.0, 1.0]) == 0.0
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(1e6) == math.inf


def results():
    weights = [10.0, 30.0]
    return [
        MethodResult("lora", 3e-4, None, 99, 0, [2.0, 1.0], [(1, 1.5), (2, 1.2)], [1.0, 2.0], measure="loss",
                     test_weights=weights),
        MethodResult("neat", 3e-4, None, 99, 0, [2.0, 1.0], [(1, 1.5), (2, 1.1)], [0.9, 1.8], measure="loss",
                     test_weights=weights),
    ]  # fmt: skip


def test_the_report_tells_loss_and_perplexity(tmp_path):
    from rich.console import Console

    console = Console(width=160, record=True, file=(tmp_path / "terminal.txt").open("w"))
    console.print(results_table(results()))
    text = console.export_text()
    assert "Loss on 2 test texts" in text
    assert "1.750 ± " in text
    assert "head" not in text
    assert perplexities(results()) == ["Perplexity, the exponential of the loss: LoRA 5.755, Neat 4.831"]
    # Weights of 10 and 30: the loss is a ratio of sums, whose deviation is that of the weighted residuals.
    difference = 0.25 * -0.1 + 0.75 * -0.2
    residuals = [10 * (-0.1 - difference) / 20, 30 * (-0.2 - difference) / 20]
    width = 1.96 * abs(residuals[0] - residuals[1]) / 2 / math.sqrt(2)
    assert comparisons(results()) == [
        f"Neat against LoRA: {difference:.4f} ± {width:.4f} nats per token (less is better), more than chance explains"
    ]
    results_json(tmp_path / "results.json", {}, results())
    lora, neat = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert (lora["test_loss"], neat["test_loss"]) == (1.75, pytest.approx(1.575))
    assert lora["test_perplexity"] == pytest.approx(math.exp(1.75))
    assert "test_values" not in lora
    draw_curves(tmp_path / "curves.png", results(), "a title")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


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
    command = [sys.executable, "-m", "neat_kernels", "finetune", "--task", "lm", "--model", folder / "llama"]
    command += ["--data", folder / "texts.txt", "--output", tmp_path / "out", *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(tmp_path / "out" / "trials" / "lora-lr0.01-seed0.safetensors", process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
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


REFUSED = {
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
