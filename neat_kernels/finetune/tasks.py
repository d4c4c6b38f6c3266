"""What a task makes of its data: token ids in rows, and how that is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from neat_kernels.finetune.batches import TaskTokens, tokenize
from neat_kernels.finetune.corpus import load_docstrings
from neat_kernels.finetune.data import Columns, TextData, load_file
from neat_kernels.finetune.lm_batches import IGNORED, Encoder, LmTokens, require_chat_template
from neat_kernels.finetune.lm_check import why_not_packed
from neat_kernels.finetune.lm_data import LmData, load_documents
from neat_kernels.finetune.methods import Targets, try_adapters
from neat_kernels.finetune.model import Pretrained
from neat_kernels.finetune.named_data import is_file, load_named
from neat_kernels.finetune.settings import LM, Settings
from neat_kernels.finetune.train import release_memory

DOCSTRING_TOKENS, FILE_TOKENS, LM_TOKENS = 32, 128, 512

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """The data of a run as it is read.

    Args:
        data: the texts.
        tokens: their token ids.
        num_labels: number of classes; None for a language model.
        told: how the texts are read, a line each.
        row: what a row of the training split is called.
        facts: what results.json says beside source, sizes and notes.
        decided: what was found out here and must be the same for a run to be gone on with.
    """

    data: TextData | LmData
    tokens: TaskTokens
    num_labels: int | None
    told: tuple[str, ...]
    row: str
    facts: dict[str, Any]
    decided: dict[str, Any] = field(default_factory=dict)


def default_length(settings: Settings) -> int:
    """How many tokens are read where --max-length is not given and the model takes as many."""
    if settings.task == LM:
        return LM_TOKENS
    return DOCSTRING_TOKENS if settings.data is None else FILE_TOKENS


def read(
    settings: Settings, pretrained: Pretrained, targets: Targets, max_length: int, device: torch.device, tell: Tell
) -> Reading:
    """Read and tokenize the data of a run.

    Args:
        settings: the run.
        pretrained: the model, whose tokenizer is used.
        targets: names of the linear layers that adapters go into.
        max_length: tokens of a text, or of a row of several.
        device: where a language model is tried.
        tell: told what is being done.

    Raises:
        UsageError: the data cannot be used; the model is no causal language model, or cannot be adapted as asked.
    """
    if settings.task == LM:
        return _language_model(settings, pretrained, targets, max_length, device, tell)
    return _classification(settings, pretrained, max_length, tell)


def _classification(settings: Settings, pretrained: Pretrained, max_length: int, tell: Tell) -> Reading:
    if settings.data is None:
        data = load_docstrings(lambda library: tell(f"Reading the docstrings of {library}"))
    else:
        columns = Columns(settings.text_column, settings.label_column, settings.pair_column)
        data = load_file(settings.data, columns) if is_file(settings.data) else load_named(settings.data, columns)
    tokens = tokenize(data, pretrained.tokenizer, max_length)
    cut = f"; {tokens.cut:.0%} of the texts are longer" if tokens.cut else ""
    told = f"the first {max_length} tokens of each text are read{cut}"
    facts = {"labels": data.label_names, "max_length": max_length, "cut": tokens.cut}
    return Reading(data, tokens, len(data.label_names), (told,), "texts", facts)


def _language_model(
    settings: Settings, pretrained: Pretrained, targets: Targets, max_length: int, device: torch.device, tell: Tell
) -> Reading:
    if settings.messages_column is not None:
        require_chat_template(pretrained.tokenizer)
    data = load_documents(settings)
    vocabulary = pretrained.config.get_text_config().vocab_size
    encoder = Encoder(pretrained.tokenizer, max_length, vocabulary)
    train, validation, test = map(encoder.split, (data.train, data.validation, data.test))
    tell("Trying whether the model keeps packed texts apart")
    backbone = pretrained.load(getattr(torch, settings.dtype))
    reason = why_not_packed(backbone, train, vocabulary, device)
    try_adapters(backbone, settings, targets)
    del backbone
    release_memory(device)
    rows = train if reason else train.pack(max_length)
    cut = encoder.cut / sum(data.sizes().values())
    facts = {"max_length": max_length, "cut": cut, "rows": len(rows), "packed": rows.packed, "not_packed": reason}
    told = (*_rows_told(rows, max_length, reason), *_lengths_told(encoder, max_length, cut))
    tokens = TaskTokens(rows, validation, test, max_length, cut)
    return Reading(data, tokens, None, told, "rows", facts, {"packed": rows.packed})


def _rows_told(rows: LmTokens, max_length: int, reason: str | None) -> list[str]:
    """What the rows of the training split are."""
    tokens = sum(map(len, rows.pieces))
    learned = sum(int((piece.labels != IGNORED).sum()) for piece in rows.pieces)
    if reason is None:
        share = tokens / (len(rows) * max_length)
        made = f"packed into {len(rows):,} rows of {max_length} tokens, {share:.0%} full; no row mixes its texts"
    else:
        made = f"in {len(rows):,} rows of up to {max_length} tokens, one text a row, not packed: {reason}"
    return [f"training texts are {made}", f"{learned:,} of {tokens:,} training tokens are learned"]


def _lengths_told(encoder: Encoder, max_length: int, cut: float) -> list[str]:
    """What became of texts that are longer than a row."""
    told = []
    if encoder.divided:
        told.append(f"{encoder.divided:,} texts are longer than {max_length} tokens: each is read as several")
    if encoder.cut:
        told.append(f"{cut:.0%} of the texts are longer than {max_length} tokens: their ends are not read")
    return told
