"""Texts as padded batches of token ids, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neat_kernels.finetune.data import Split, TextData
from neat_kernels.finetune.settings import UsageError


@dataclass(frozen=True)
class Tokens:
    """The token ids of each text and its label."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """The chosen rows, padded on the right to the longest of them."""
        length = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for position, row in enumerate(rows):
            ids[position, : len(self.ids[row])] = torch.tensor(self.ids[row])
            mask[position, : len(self.ids[row])] = 1
        labels = torch.tensor([self.labels[row] for row in rows])
        return Batch(ids.to(device), mask.to(device), labels.to(device), sum(len(self.ids[row]) for row in rows))

    def in_order_of_length(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all rows once, texts of like length together, so that little is spent on padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], device)


@dataclass(frozen=True)
class Batch:
    """Token ids and mask [batch, length], labels [batch], and how many tokens are not padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    tokens: int


@dataclass(frozen=True)
class TaskTokens:
    """The three splits of a task as token ids of at most `max_length`, and the share of the texts that were cut."""

    train: Tokens
    validation: Tokens
    test: Tokens
    max_length: int
    cut: float


def tokenize(data: TextData, tokenizer: Any, max_length: int) -> TaskTokens:
    """Every split of the task as token ids, cut to `max_length` tokens."""
    splits = (data.train, data.validation, data.test)
    cut = sum(longer_than(max_length, split, tokenizer) for split in splits) / sum(map(len, splits))
    train, validation, test = (tokenize_split(split, tokenizer, max_length) for split in splits)
    return TaskTokens(train, validation, test, max_length, cut)


def tokenize_split(split: Split, tokenizer: Any, max_length: int) -> Tokens:
    """The token ids of one split."""
    encoded = tokenizer(list(split.texts), truncation=True, max_length=max_length)["input_ids"]
    for text, ids in zip(split.texts, encoded, strict=True):
        if not ids:
            raise UsageError(f"the tokenizer makes no token of the text {text[:80]!r}")
    return Tokens(tuple(map(tuple, encoded)), split.labels, tokenizer.pad_token_id)


def longer_than(max_length: int, split: Split, tokenizer: Any) -> int:
    """How many texts have more tokens than are read."""
    encoded = tokenizer(list(split.texts), truncation=True, max_length=max_length + 1)["input_ids"]
    return sum(len(ids) > max_length for ids in encoded)


def plan_steps(rows: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of every training step: shuffled passes over the data, each without its incomplete last batch.

    Args:
        rows: number of training texts.
        batch_size: texts in a step, at most `rows`.
        steps: number of steps.
        seed: seed of the shuffles.

    Returns:
        For each step its row indices.

    Raises:
        UsageError: if one batch needs more texts than there are.
    """
    if batch_size > rows:
        raise UsageError(f"--batch-size must be at most the number of training texts, {rows}; got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = torch.randperm(rows, generator=generator).tolist()
        plan += [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]
    return plan[:steps]
