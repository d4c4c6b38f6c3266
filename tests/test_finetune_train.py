"""The training loop, the methods, the measurements and the report, on tiny random models."""

import base64
import dataclasses
import json
import math
import re

import pytest
import torch
from finetune_problem import LABELS, rows, save_model

from neat_kernels.finetune.batches import Tokens, plan_steps, tokenize
from neat_kernels.finetune.data import split_rows
from neat_kernels.finetune.defaults import HEAD_LEARNING_RATE
from neat_kernels.finetune.memory import held_bytes, peak_of_step, traced_peak
from neat_kernels.finetune.methods import prepare
from neat_kernels.finetune.model import Pretrained, TextClassifier
from neat_kernels.finetune.page import write_page
from neat_kernels.finetune.report import comparisons, draw_curves, results_json, results_table, running_mean
from neat_kernels.finetune.settings import METHODS, Settings
from neat_kernels.finetune.train import (
    MethodResult,
    Trainer,
    TrainingError,
    largest_step,
    parameter_groups,
    train_method,
    warm_up_then_decay,
)
from neat_kernels.usage import UsageError

CPU = torch.device("cpu")
SETTINGS = Settings(r=4, lr=2e-2, steps=40, batch_size=8)


class Silent:
    def __init__(self):
        self.steps, self.accuracies = [], []

    def start(self, method, steps):
        self.method = method

    def step(self, step, loss, tokens_per_second):
        self.steps.append(step)

    def evaluated(self, step, loss, accuracy):
        self.accuracies.append((step, accuracy))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in ("bert", "llama", "gpt2")}


@pytest.fixture(scope="session")
def bert(folders):
    return Pretrained.find(str(folders["bert"]))


@pytest.fixture(scope="session")
def tokens(bert):
    return tokenize(split_rows(rows(), source="test", validation=0.1, test=0.2), bert.tokenizer, 12)


def train(method, pretrained, tokens, settings=SETTINGS, progress=None):
    targets = pretrained.default_targets()
    return train_method(method, settings, pretrained, targets, tokens, len(LABELS), CPU, progress or Silent())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_is_measured(method, bert, tokens):
    progress = Silent()
    result = train(method, bert, tokens, progress=progress)
    assert sum(result.losses[-5:]) < 0.8 * sum(result.losses[:5])
    assert result.test_score > 0.6
    assert progress.steps == list(range(1, 41))
    assert result.validation == progress.accuracies
    assert [step for step, _ in result.validation] == [8, 16, 24, 32, 40]
    assert result.step_ms > 0
    assert result.peak_bytes > 4 * sum(p.numel() for p in bert.load(torch.float32).parameters())


def test_lora_and_neat_train_the_same_number_of_parameters_and_the_probe_only_the_head(bert, tokens):
    one_step = dataclasses.replace(SETTINGS, steps=1)
    counts = {method: train(method, bert, tokens, one_step) for method in METHODS}
    head = 32 * len(LABELS) + len(LABELS)
    assert {result.head for result in counts.values()} == {head}
    assert counts["probe"].trainable == head
    # 2 layers × (query, value) × r × (32 + 32)
    assert counts["lora"].trainable == counts["neat"].trainable == head + 4 * 4 * 64
    assert counts["full"].trainable == head + sum(p.numel() for p in bert.load(torch.float32).parameters())


def test_a_method_does_not_depend_on_what_ran_before(bert, tokens):
    alone = train("neat", bert, tokens)
    train("lora", bert, tokens)
    again = train("neat", bert, tokens)
    assert again.losses == alone.losses
    assert (again.test_score, again.peak_bytes) == (alone.test_score, alone.peak_bytes)


@pytest.mark.parametrize("method", ["probe", "lora", "neat"])
def test_the_pretrained_weights_stay_as_they_were(method, bert, tokens):
    before = bert.load(torch.float32)
    backbone = prepare(method, bert.load(torch.float32), SETTINGS, bert.default_targets())
    trainer = Trainer(TextClassifier(backbone, 32, len(LABELS), 0), method, SETTINGS, CPU)
    for batch in (tokens.train.batch(range(8), CPU), tokens.train.batch(range(8, 16), CPU)):
        trainer.step(batch)
    after = list(backbone.state_dict().values())
    for weight in before.state_dict().values():
        assert any(weight.shape == tensor.shape and torch.equal(weight, tensor) for tensor in after)


def test_methods_start_from_the_same_function(bert, tokens):
    batch = tokens.train.batch(range(8), CPU)
    logits = []
    for method in METHODS:
        backbone = prepare(method, bert.load(torch.float32), SETTINGS, bert.default_targets())
        logits.append(TextClassifier(backbone, 32, len(LABELS), 5).eval()(**batch.inputs))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])


def test_the_head_trains_at_the_same_rate_beside_every_method(bert, tokens):
    rates = {}
    for method in METHODS:
        backbone = prepare(method, bert.load(torch.float32), SETTINGS, bert.default_targets())
        model = TextClassifier(backbone, 32, len(LABELS), 0)
        groups = parameter_groups(model, method, SETTINGS)
        rates[method] = [group["lr"] for group in groups]
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert groups[0]["params"] == list(model.head.parameters())
    adapted = [HEAD_LEARNING_RATE, SETTINGS.lr]
    assert rates == {"probe": [SETTINGS.lr], "lora": adapted, "neat": adapted, "full": adapted}


def test_padding_changes_no_logits(bert, tokens):
    model = TextClassifier(bert.load(torch.float32), 32, len(LABELS), 0).eval()
    short = min(range(len(tokens.train)), key=lambda row: len(tokens.train.ids[row]))
    long = max(range(len(tokens.train)), key=lambda row: len(tokens.train.ids[row]))
    alone, both = tokens.train.batch([short], CPU), tokens.train.batch([short, long], CPU)
    assert both.inputs["input_ids"].shape[1] > alone.inputs["input_ids"].shape[1]
    torch.testing.assert_close(model(**alone.inputs)[0], model(**both.inputs)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes_keep_what_trains_in_float32(method, dtype, bert, tokens):
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    half = getattr(torch, dtype)
    backbone = prepare(method, bert.load(half), settings, bert.default_targets())
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} <= {torch.float32}
    assert {p.dtype for p in backbone.parameters() if not p.requires_grad} <= {half}
    result = train(method, bert, tokens, settings)
    assert sum(result.losses[-5:]) < 0.9 * sum(result.losses[:5])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "neat"])
def test_decoders_train_too(kind, method, folders, tokens):
    result = train(method, Pretrained.find(str(folders[kind])), tokens)
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    assert result.trainable > result.head


@pytest.mark.parametrize("method", ["lora", "neat"])
def test_all_linear(method, bert):
    backbone = prepare(method, bert.load(torch.float32), SETTINGS, ("all-linear",))
    adapted = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    # Neat's A and B both have out_features; LoRA's have in_features and out_features.
    square, wide, narrow = 4 * 2 * 32, 2 * 48 if method == "neat" else 32 + 48, 2 * 32 if method == "neat" else 32 + 48
    assert adapted == 2 * 4 * (square + wide + narrow)


def test_a_loss_that_is_not_finite_stops_the_run(bert, tokens):
    settings = dataclasses.replace(SETTINGS, lr=1e30)
    with pytest.raises(TrainingError, match=r"full: the loss is .* at step \d+, lr 1e\+30; try a smaller --lr"):
        train("full", bert, tokens, settings)


def test_plan_of_steps_is_whole_shuffled_passes():
    plan = plan_steps(rows=10, batch_size=3, steps=7, seed=1)
    assert [len(step) for step in plan] == [3] * 7
    for start in (0, 3):
        seen = [row for step in plan[start : start + 3] for row in step]
        assert len(set(seen)) == 9
    assert plan == plan_steps(rows=10, batch_size=3, steps=7, seed=1)
    assert plan[:4] == plan_steps(rows=10, batch_size=3, steps=4, seed=1)
    assert plan != plan_steps(rows=10, batch_size=3, steps=7, seed=2)
    with pytest.raises(UsageError, match="--batch-size must be at most the number of training texts, 10; got 11"):
        plan_steps(rows=10, batch_size=11, steps=1, seed=0)


def test_cut_texts_are_counted(bert):
    data = split_rows(rows(), source="test", validation=0.1, test=0.2)
    texts = [*data.train.texts, *data.validation.texts, *data.test.texts]
    # Each word, the number and the two tokens around them.
    longer = sum(len(text.split()) + 2 > 8 for text in texts)
    assert 0 < longer < len(texts)
    tokens = tokenize(data, bert.tokenizer, 8)
    assert tokens.cut == longer / len(texts)
    assert max(len(ids) for ids in tokens.train.ids) == 8


def test_learning_rate_schedule():
    factors = [warm_up_then_decay(step, 100) for step in range(101)]
    assert factors[5] == 1.0
    assert factors[:6] == sorted(factors[:6])
    assert factors[6:] == sorted(factors[6:], reverse=True)
    assert factors[0] > 0
    assert factors[99] > 0
    assert factors[100] == 0
    assert warm_up_then_decay(0, 1) == 1.0


def test_traced_peak_counts_what_is_held_at_one_time():
    mebibyte = 2**20

    def one_after_the_other():
        for _ in range(5):
            torch.empty(mebibyte, dtype=torch.uint8)

    def together():
        kept = [torch.empty(mebibyte, dtype=torch.uint8) for _ in range(5)]
        kept.clear()

    assert traced_peak(one_after_the_other) == mebibyte
    assert traced_peak(together) == 5 * mebibyte


def test_peak_of_a_step_holds_weights_optimizer_state_and_gradients():
    model = torch.nn.Linear(1000, 1000, bias=False)
    weight = 4 * 1000 * 1000
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x = torch.ones(1, 1000)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert weight * 3 <= held_bytes(model, optimizer) < weight * 3 + 1000
    peak = peak_of_step(step, model, optimizer)
    assert 4 * weight <= peak <= 6.1 * weight


def test_largest_step_is_not_the_first():
    tokens = Tokens(tuple((1,) * length for length in (9, 2, 3, 5)), (0, 0, 0, 0), 0)
    assert largest_step([[0, 1], [1, 2], [2, 3], [0, 3], [1, 2]], tokens) == 3
    assert largest_step([[0]], tokens) == 0


def test_models_that_cannot_be_used_are_refused(tmp_path, folders):
    from transformers import T5Config

    with pytest.raises(UsageError, match="must be a folder or a hub id of a text model"):
        Pretrained.find(str(tmp_path))
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folders["bert"] / "tokenizer.json").read_text())
    with pytest.raises(UsageError, match="is an encoder-decoder"):
        Pretrained.find(str(tmp_path))


def test_weights_that_are_missing_are_refused(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="has no weights that can be loaded"):
        Pretrained.find(str(folder)).load(torch.float32)


def test_an_architecture_without_default_layers_asks_for_names(bert):
    unknown = dataclasses.replace(bert, config=dataclasses.make_dataclass("C", ["model_type"])("novel"))
    with pytest.raises(UsageError, match=r"no default for model type 'novel': name layers with --target-modules"):
        unknown.default_targets()


# Of 400 texts the probe gets 250 right and Neat 300, 200 of them both.
RIGHT = ([True] * 250 + [False] * 150, [False] * 50 + [True] * 300 + [False] * 50)


def results():
    return [
        MethodResult("probe", 0.03, 0.03, 99, 99, [2.0, 1.5, 1.0], [(2, 0.5), (3, 0.6)], RIGHT[0], 10.0, 1e4, 2**24),
        MethodResult("neat", 0.01, 0.03, 1099, 99, [2.0, 1.2, 0.7], [(2, 0.6), (3, 0.8)], RIGHT[1]),
    ]


def test_the_report_tells_what_was_measured_and_what_was_not(tmp_path):
    from rich.console import Console

    console = Console(width=160, record=True, file=(tmp_path / "terminal.txt").open("w"))
    console.print(results_table(results()))
    lines = console.export_text()
    probe, neat = (next(line for line in lines.splitlines() if name in line) for name in ("linear probe", "Neat"))
    numbers = [word for word in probe.split() if word[0].isdigit()]
    assert numbers == ["62.5", "4.7", "99", "0.03", "10", "10,000", "16"]
    assert "75.0 ± 4.2 %" in neat
    assert neat.count("–") == 3
    results_json(tmp_path / "results.json", {"seed": 3}, results())
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seed"] == 3
    assert content["methods"][1]["step_ms"] is None
    assert content["methods"][1]["losses"] == [2.0, 1.2, 0.7]
    assert math.isclose(content["methods"][0]["test_accuracy_half_width_95"], 1.96 * math.sqrt(0.625 * 0.375 / 400))


def test_neat_is_compared_on_the_same_texts():
    # Neat alone is right on 100 texts, the probe alone on 50: a variance of 150/400 − (50/400)².
    width = 196 * math.sqrt((0.375 - 0.125**2) / 400)
    assert comparisons(results()) == [
        f"Neat against linear probe: +12.5 ± {width:.1f} points, more than chance explains"
    ]
    probe, neat = results()
    neat.test_values = probe.test_values[::-1]
    assert comparisons([neat, probe])[0].startswith("Neat against linear probe: +0.0 ± ")
    assert comparisons([neat, probe])[0].endswith("within what chance explains")
    assert comparisons([probe]) == []


def test_curves_are_a_picture_and_replace_nothing_half_way(tmp_path):
    from PIL import Image

    draw_curves(tmp_path / "curves.png", results(), "a title")
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()
        assert image.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_the_report_holds_all_it_shows(tmp_path):
    draw_curves(tmp_path / "curves.png", results(), "a title")
    picture = (tmp_path / "curves.png").read_bytes()
    title, left = "texts <of> & more", ['load("a folder")']
    write_page(tmp_path / "report.html", title, picture, {"device": "a [bold] one", "data": {"n": 3}}, results(), left)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert base64.b64encode(picture).decode() in page
    assert "<title>texts &lt;of&gt; &amp; more</title>" in page
    assert "a [bold] one" in page
    assert "load(&quot;a folder&quot;)" in page
    for result in results():
        assert f"{100 * result.test_score:.1f} ±" in page
    # Nothing is fetched from elsewhere.
    assert not re.search(r"(src|href)=.(?!data:)|url\(|@import", page)


def test_running_mean():
    assert running_mean([4.0, 2.0]) == [4.0, 2.0]
    values = [float(value) for value in range(40)]
    assert running_mean(values)[:3] == [0.0, 0.5, 1.5]
    assert running_mean(values)[-1] == 38.5
