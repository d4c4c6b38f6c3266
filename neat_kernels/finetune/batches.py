"""Texts as padded batches of token ids, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from neat_kernels.finetune.data import Split, Text, TextData
from neat_kernels.usage import UsageError


class Rows(Protocol):
    """What a training step and a measurement read: the rows of one split as batches."""

    def __len__(self) -> int:
        """Number of rows."""

    def length(self, row: int) -> int:
        """Tokens of a row that are not padding."""

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """The chosen rows, padded on the right to the longest of them."""

    def in_order_of_length(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all rows once, rows of like length together, so that little is spent on padding."""


@dataclass(frozen=True)
class Tokens:
    """The token ids of each text and its label; of pairs also which text a token is of, if the tokenizer says it."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad_id: int
    types: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, row: int) -> int:
        """Tokens of a text."""
        return len(self.ids[row])

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """The chosen rows, padded on the right to the longest of them."""
        lengths = [len(self.ids[row]) for row in rows]
        mask = padded([(1,) * length for length in lengths], 0)
        inputs = {"input_ids": padded([self.ids[row] for row in rows], self.pad_id), "attention_mask": mask}
        if self.types is not None:
            inputs["token_type_ids"] = padded([self.types[row] for row in rows], 0)
        labels = torch.tensor([self.labels[row] for row in rows])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return Batch(inputs, labels.to(device), sum(lengths))

    def in_order_of_length(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all rows once, texts of like length together, so that little is spent on padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], device)


@dataclass(frozen=True)
class Batch:
    """What the model is given, and what it should say.

    Args:
        inputs: tensors [batch, length] by name.
        labels: [batch]; of a language model [batch, length].
        tokens: how many are not padding.
        owners: the text that each row is of, where a text may have several rows.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int
    owners: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskTokens:
    """The three splits of a task as token ids of at most `max_length`, and the share of the texts that were cut."""

    train: Rows
    validation: Rows
    test: Rows
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
    encoded = encode(split.texts, tokenizer, max_length)
    for text, ids in zip(split.texts, encoded["input_ids"], strict=True):
        if not ids:
            raise UsageError(f"the tokenizer makes no token of the text {str(text)[:80]!r}")
    return as_tokens(encoded, split.labels, tokenizer)


def encode(texts: Sequence[Text], tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """The token ids of texts, or of pairs with their types, cut to `max_length`: of a pair the longer text first."""
    if isinstance(texts[0], str):
        return {"input_ids": tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]}
    firsts, seconds = map(list, zip(*texts, strict=True))
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_length)
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def as_tokens(encoded: dict[str, list[list[int]]], labels: tuple[int, ...], tokenizer: Any) -> Tokens:
    """What `encode` returned, with labels."""
    types = encoded.get("token_type_ids")
    return Tokens(
        tuple(map(tuple, encoded["input_ids"])),
        labels,
        tokenizer.pad_token_id,
        None if types is None else tuple(map(tuple, types)),
    )


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """The rows [len(rows), longest], `value` behind each."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def longer_than(max_length: int, split: Split, tokenizer: Any) -> int:
    """How many texts have more tokens than are read."""
    encoded = encode(split.texts, tokenizer, max_length + 1)
    return sum(len(ids) > max_length for ids in encoded["input_ids"])


def plan_steps(rows: int, batch_size: int, steps: int, seed: int, unit: str = "texts") -> list[list[int]]:
    """The rows of every training step: shuffled passes over the data, each without its incomplete last batch.

    Args:
        rows: number of training texts.
        batch_size: texts in a step, at most `rows`.
        steps: number of steps.
        seed: seed of the shuffles.
        unit: what a row is called in the message.

    Returns:
        For each step its row indices.

    Raises:
        UsageError: if one batch needs more texts than there are.
    """
    if batch_size > rows:
        raise UsageError(f"--batch-size must be at most the number of training {unit}, {rows}; got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = torch.randperm(rows, generator=generator).tolist()
        plan += [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]
    return plan[:steps]
