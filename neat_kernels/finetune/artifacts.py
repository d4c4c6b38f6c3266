"""What a run leaves behind: each method's adapter and head, and how to load them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.folder import check_destination, whole_folder
from neat_kernels.adapters.inventory import copied
from neat_kernels.adapters.load import load_adapter
from neat_kernels.adapters.lora_export import export_lora
from neat_kernels.adapters.lora_import import from_lora
from neat_kernels.adapters.save import save_adapter, write_json, write_tensors
from neat_kernels.finetune.batches import Batch, as_tokens, encode
from neat_kernels.finetune.data import Text
from neat_kernels.finetune.model import CLASSES, Pretrained, TaskModel, TextClassifier, default_folder
from neat_kernels.finetune.settings import CLASSIFY, LM
from neat_kernels.usage import UsageError
from neat_kernels.vocabulary import check_int

CLASSIFIER, LANGUAGE_MODEL, HEAD = "classifier.json", "language_model.json", "head.safetensors"
ADAPTER, LORA, MODEL = "adapter", "lora", "model"
FORMAT = 1
_PREDICTION_BATCH = 64
# What a run leaves in the folder of a method.
_OWN = (
    CLASSIFIER, LANGUAGE_MODEL, HEAD, ADAPTER, LORA, MODEL, f"{ADAPTER}/adapter_*", f"{ADAPTER}/README.md",
    f"{LORA}/adapter_*", f"{LORA}/README.md", f"{MODEL}/*.json", f"{MODEL}/model*.safetensors",
    f"{MODEL}/chat_template.jinja", f"{MODEL}/merges.txt", f"{MODEL}/vocab.txt", f"{MODEL}/tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a classifier needs to know beside its weights.

    Args:
        model: as in the settings; None is the default model.
        labels: name of each label index.
        max_length: tokens read of each text.
        pairs: whether what is labelled is a pair of texts.
    """

    model: str | None
    labels: tuple[str, ...]
    max_length: int
    pairs: bool = False


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, ready to label texts."""

    model: TextClassifier
    tokenizer: Any
    task: Task

    @torch.no_grad()
    def probabilities(self, texts: Sequence[Text]) -> Tensor:
        """Probability of each label for each text, [texts, labels] in float32; UsageError for what is none."""
        if not texts:
            return torch.empty(0, len(self.task.labels))
        self.model.eval()
        for text in texts:
            self._check(text)
        encoded = encode(texts, self.tokenizer, self.task.max_length)
        tokens = as_tokens(encoded, (0,) * len(texts), self.tokenizer)
        starts = range(0, len(texts), _PREDICTION_BATCH)
        rows = [list(range(len(texts)))[start : start + _PREDICTION_BATCH] for start in starts]
        batches = (tokens.batch(chosen, self.model.head.weight.device) for chosen in rows)
        return torch.cat([self.model(**batch.inputs).float().softmax(-1).cpu() for batch in batches])

    def __call__(self, texts: Sequence[Text]) -> list[str]:
        """The most probable label of each text, or pair of texts if it was trained on pairs."""
        return [self.task.labels[index] for index in self.probabilities(texts).argmax(-1).tolist()]

    def _check(self, text: object) -> None:
        of_pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not (of_pair if self.task.pairs else isinstance(text, str)):
            wanted = "(text, text)" if self.task.pairs else "a text"
            raise UsageError(f"this classifier was trained on {'pairs' if self.task.pairs else 'texts'}: "
                             f"expected {wanted} each, got {text!r}")  # fmt: skip


def save_trained(folder: Path, method: str, model: TextClassifier, task: Task, batch: Batch, overwrite: bool) -> None:
    """Write what `method` has trained: its adapter or model, the head and the labels, whole or not at all.

    Args:
        folder: of this method.
        method: probe, lora, neat or full.
        model: the trained model.
        task: what the labels are.
        batch: texts by which the export as LoRA is checked.
        overwrite: replace what an earlier run has left there.

    Raises:
        AdapterError: the folder holds other files, or what was trained is not finite.
        OSError: the disk is full or cannot be written.
    """
    _check_replaceable(folder, overwrite)
    head = {name: copied(f"head.{name}", value) for name, value in model.head.state_dict().items()}
    with whole_folder(folder) as temporary:
        lines = _SAVE[method](temporary, folder, model.backbone, batch, CLASSIFY)
        if method in _ON_A_MODEL:
            lines.insert(0, _model_line(task.model or default_folder(), CLASSIFY))
        write_tensors(temporary / HEAD, head, {})
        facts = {
            "format": FORMAT,
            "method": method,
            "model": task.model,
            "labels": task.labels,
            "max_length": task.max_length,
            "pairs": task.pairs,
            "load": [f'neat_kernels.finetune.load_classifier("{folder}") labels texts', *lines],
        }
        write_json(temporary / CLASSIFIER, facts)


def save_language_model(
    folder: Path, method: str, model: TaskModel, base: str, tokenizer: Any, batch: Batch, overwrite: bool
) -> None:
    """Write what `method` has trained of a language model: its adapter or model, whole or not at all.

    Args:
        folder: of this method.
        method: lora, neat or full.
        model: the trained model.
        base: folder or hub id of the model that it was made from.
        tokenizer: of that model, written beside a whole model.
        batch: texts by which the export as LoRA is checked.
        overwrite: replace what an earlier run has left there.

    Raises:
        AdapterError: the folder holds other files, or what was trained is not finite.
        OSError: the disk is full or cannot be written.
    """
    _check_replaceable(folder, overwrite)
    with whole_folder(folder) as temporary:
        lines = _SAVE[method](temporary, folder, model.backbone, batch, LM)
        if method in _ON_A_MODEL:
            lines.insert(0, _model_line(base, LM))
        else:
            tokenizer.save_pretrained(temporary / MODEL)
        write_json(temporary / LANGUAGE_MODEL, {"format": FORMAT, "method": method, "model": base, "load": lines})


def how_to_load(folder: Path) -> list[str]:
    """How what a run has left in the folder of a method is loaded, a line each."""
    path = next(path for path in (folder / CLASSIFIER, folder / LANGUAGE_MODEL) if path.is_file())
    return list(json.loads(path.read_text(encoding="utf-8"))["load"])


def load_classifier(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", *, model: str | None = None
) -> Classifier:
    """The classifier that `neat-kernels finetune` has left in the folder of one method.

    Args:
        folder: with classifier.json.
        device: where the classifier goes.
        model: folder or hub id of the base model; None is the one that classifier.json names, from safetensors alone.

    Returns:
        It labels texts: `classifier(["..."])`.

    Raises:
        UsageError: the folder holds no whole classifier, or its base model is not there.
        AdapterError: its adapter is broken or does not fit the base model.
    """
    path = Path(folder)
    task, method = _read_task(path)
    pretrained = Pretrained.find(task.model if model is None else model)
    if task.max_length > pretrained.max_length():
        raise UsageError(
            f"{path / CLASSIFIER}: expected max_length up to {pretrained.max_length()}, got {task.max_length}"
        )
    # A pickle that a file names must not be opened for that.
    backbone = _load_backbone(path, method, pretrained, unpickle=model is not None)
    classifier = TextClassifier(backbone, pretrained.config.hidden_size, len(task.labels), seed=0)
    _load_head(path / HEAD, classifier.head)
    return Classifier(classifier.to(device).eval(), pretrained.tokenizer, task)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise AdapterError where a folder would take files with it that no run has written."""
    there = [path.relative_to(folder) for path in folder.rglob("*")] if folder.is_dir() else []
    foreign = [path for path in there if not any(path.match(pattern) for pattern in _OWN)]
    if foreign:
        raise AdapterError(f"{folder}: expected nothing but what an earlier run has left, got {foreign[0]} too")
    check_destination(folder, overwrite, {path.parts[0] for path in there})


def _save_neat(temporary: Path, folder: Path, backbone: nn.Module, batch: Batch, task: str) -> list[str]:
    saved = save_adapter(backbone, temporary / ADAPTER)
    exported = export_lora(backbone, temporary / LORA, batch=batch.inputs)
    compared = "logits" if task == LM else "hidden states"
    by_peft = "" if saved.reasons else f', or peft.PeftModel.from_pretrained(model, "{folder / ADAPTER}")'
    return [
        f'neat_kernels.load_adapter(model, "{folder / ADAPTER}"){by_peft}',
        f'peft.PeftModel.from_pretrained(model, "{folder / LORA}") as LoRA; the {compared} differ by at most '
        f"{exported.max_difference:.1g} of {exported.max_logit:.1g}",
    ]


def _save_lora(temporary: Path, folder: Path, backbone: Any, batch: Batch, task: str) -> list[str]:
    backbone.save_pretrained(temporary / ADAPTER)
    return [
        f'peft.PeftModel.from_pretrained(model, "{folder / ADAPTER}"), '
        f'or neat_kernels.from_lora("{folder / ADAPTER}", model)'
    ]


def _save_full(temporary: Path, folder: Path, backbone: Any, batch: Batch, task: str) -> list[str]:
    backbone.save_pretrained(temporary / MODEL)
    return [f'transformers.{CLASSES[task]}.from_pretrained("{folder / MODEL}")']


def _save_probe(temporary: Path, folder: Path, backbone: Any, batch: Batch, task: str) -> list[str]:
    return []


_SAVE = {"neat": _save_neat, "lora": _save_lora, "full": _save_full, "probe": _save_probe}
# What these leave goes into the model that it was made from.
_ON_A_MODEL = ("neat", "lora")


def _model_line(base: str, task: str) -> str:
    return f'model = transformers.{CLASSES[task]}.from_pretrained("{base}")'


def _read_task(folder: Path) -> tuple[Task, str]:
    try:
        facts = json.loads((folder / CLASSIFIER).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT or facts["method"] not in _SAVE:
            raise ValueError(f"format {facts['format']!r} of method {facts['method']!r}")
        task = Task(facts["model"], tuple(facts["labels"]), facts["max_length"], facts.get("pairs", False))
        names = [*task.labels, *(() if task.model is None else (task.model,))]
        if not isinstance(facts["labels"], list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"labels {facts['labels']!r} of model {task.model!r}")
        check_int("max_length", task.max_length, 1)
        if not isinstance(task.pairs, bool):
            raise ValueError(f"pairs {task.pairs!r}")
        return task, facts["method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder}: expected a whole classifier with a {CLASSIFIER}, got {error!r}") from error


def _load_backbone(folder: Path, method: str, pretrained: Pretrained, unpickle: bool) -> nn.Module:
    if method == "full":
        from transformers import AutoModel

        return AutoModel.from_pretrained(
            folder / MODEL, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    backbone = pretrained.load(torch.float32, unpickle)
    if method == "neat":
        load_adapter(backbone, folder / ADAPTER)
    elif method == "lora":
        from_lora(folder / ADAPTER, backbone)
    return backbone


def _load_head(path: Path, head: nn.Linear) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(path)
        if bad := [name for name, value in values.items() if not value.isfinite().all()]:
            raise ValueError(f"values that are not finite in {bad[0]}")
        head.load_state_dict(values)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path}: expected the weight and bias of a head, got {error}") from error
