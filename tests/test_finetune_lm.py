"""Language models from end to end: packed texts kept apart, training, measures, resuming, what is left behind."""

import dataclasses
import json
import math

import lm_problem as problem
import pytest
import torch
from test_finetune_train import Silent
from torch import nn

from neat_kernels.finetune.batches import TaskTokens
from neat_kernels.finetune.defaults import LM_LEARNING_RATES
from neat_kernels.finetune.lm_batches import Encoder
from neat_kernels.finetune.lm_check import why_not_packed
from neat_kernels.finetune.lm_data import Document
from neat_kernels.finetune.measure import ACCURACY, LOSS, half_width, mean, perplexity
from neat_kernels.finetune.model import LanguageModel, Pretrained
from neat_kernels.finetune.report import comparisons, draw_curves, perplexities, results_json, results_table
from neat_kernels.finetune.settings import Settings
from neat_kernels.finetune.train import MethodResult, Trainer, TrainingError, train_method
from neat_kernels.finetune.trials import TrialFiles, run_trials
from neat_kernels.interrupt import Interrupted
from neat_kernels.usage import UsageError

CPU = torch.device("cpu")
METHODS = tuple(LM_LEARNING_RATES)
SETTINGS = Settings(task="lm", model="m", data="d", methods=METHODS, r=4, lr=1e-2, steps=30, batch_size=4)
TIMES = ("step_ms", "tokens_per_second", "peak_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return problem.save_everything(tmp_path_factory.mktemp("problem"))


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
    # Of this one texts that leak differ by less than what bfloat16 rounds.
    pretrained = Pretrained.find(str(folder / "bloom"), "lm")
    assert why_not_packed(pretrained.load(torch.bfloat16), encoded(pretrained.tokenizer), 64, CPU)


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
