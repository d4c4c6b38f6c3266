"""Texts for a language model as token ids, several of them packed into one row."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neat_kernels.finetune.batches import Batch
from neat_kernels.finetune.lm_data import Document
from neat_kernels.usage import UsageError

# What transformers and torch's cross-entropy skip.
IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """A text, or as much of it as one row takes, [length]; labels are the ids, or IGNORED where nothing is learned."""

    ids: Tensor
    labels: Tensor
    document: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LmTokens:
    """The rows of one split.

    Args:
        pieces: of all texts.
        rows: indices of the pieces in each row.
        pad_id: what fills a row that is shorter than others.
        packed: whether each row is told apart by positions that begin anew at each piece, which lets a model that
            reads them keep the pieces apart; otherwise a row is one piece, and a mask tells its padding.
    """

    pieces: tuple[Piece, ...]
    rows: tuple[tuple[int, ...], ...]
    pad_id: int
    packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, row: int) -> int:
        """Tokens of a row that are not padding."""
        return sum(len(self.pieces[piece]) for piece in self.rows[row])

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """The chosen rows, padded on the right to the longest of them."""
        chosen = [[self.pieces[piece] for piece in self.rows[row]] for row in rows]
        lengths = [sum(map(len, pieces)) for pieces in chosen]
        ids = torch.full((len(rows), max(lengths)), self.pad_id)
        labels = torch.full_like(ids, IGNORED)
        # Padding is a text of its own: whatever it begins at, nothing before it sees it.
        positions = torch.arange(max(lengths)) - torch.tensor(lengths)[:, None]
        for row, pieces in enumerate(chosen):
            start = 0
            for piece in pieces:
                end = start + len(piece)
                ids[row, start:end], labels[row, start:end] = piece.ids, piece.labels
                positions[row, start:end] = torch.arange(len(piece))
                start = end
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        told = {"position_ids": positions} if self.packed else {"attention_mask": mask}
        inputs = {name: tensor.to(device) for name, tensor in {"input_ids": ids, **told}.items()}
        owners = () if self.packed else tuple(pieces[0].document for pieces in chosen)
        return Batch(inputs, labels.to(device), sum(lengths), owners)

    def in_order_of_length(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all rows once, rows of like length together, so that little is spent on padding."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], device)

    def pack(self, length: int) -> LmTokens:
        """The same pieces in rows of at most `length` tokens."""
        return LmTokens(self.pieces, pack(list(map(len, self.pieces)), length), self.pad_id, packed=True)


def pack(lengths: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Pieces in rows of at most `room` tokens: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: of the pieces, each at most `room`.
        room: of a row.

    Returns:
        The indices of the pieces in each row.
    """
    rows: list[list[int]] = []
    # (room left, row) of every row that is not full, in order.
    spaces: list[tuple[int, int]] = []
    for piece in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        found = bisect_left(spaces, (lengths[piece], -1))
        if found < len(spaces):
            left, row = spaces.pop(found)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > lengths[piece]:
            insort(spaces, (left - lengths[piece], row))
    return tuple(map(tuple, rows))


class Encoder:
    """Turns documents into pieces of at most `max_length` tokens.

    A text begins with the tokenizer's begin-of-text token, where the tokenizer writes one, and ends with its
    end-of-text token, where it has one. A prompt and its text are tokenized apart, as they are when the model is asked
    to go on from the prompt.

    Args:
        tokenizer: of the model.
        max_length: tokens of a row.
        vocabulary: number of token ids that the model knows.
    """

    def __init__(self, tokenizer: Any, max_length: int, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.begin = [begin] if begin is not None and begin in tokenizer("")["input_ids"][:1] else []
        self.end = [] if end is None else [end]
        # Texts that were cut, and texts that are read in several pieces.
        self.cut = self.divided = 0

    def split(self, documents: Sequence[Document]) -> LmTokens:
        """The pieces of one split, one in each row."""
        pieces = [piece for index, document in enumerate(documents) for piece in self._pieces(index, document)]
        rows = tuple((index,) for index in range(len(pieces)))
        return LmTokens(tuple(pieces), rows, self.tokenizer.pad_token_id)

    def _pieces(self, index: int, document: Document) -> list[Piece]:
        if document.messages:
            ids, learned = self._chat(document)
        else:
            prompt = self.begin + (self._ids(document.prompt) if document.prompt else [])
            text = self._ids(document.text) + self.end
            ids, learned = prompt + text, [False] * len(prompt) + [True] * len(text)
        if max(ids) >= self.vocabulary:
            raise UsageError(f"the model knows {self.vocabulary} token ids; its tokenizer makes {max(ids)} of a text")
        whole = document.prompt or document.messages
        if whole and not any(learned[1 : self.max_length]):
            if not any(learned):
                raise UsageError(f"expected an assistant's turn in every chat, got none: {_beginning(document)}")
            raise UsageError(
                f"--max-length {self.max_length}: expected a row to hold some of what is learned, got "
                f"{learned.index(True)} tokens before it: {_beginning(document)}"
            )
        self.cut += bool(whole) and len(ids) > self.max_length
        self.divided += not whole and len(ids) > self.max_length
        starts = [0] if whole else range(0, len(ids), self.max_length)
        pieces = [self._piece(index, ids, learned, start) for start in starts]
        # Nothing stands before the first token of a piece that it could be told from.
        kept = [piece for piece in pieces if len(piece) > 1]
        if not kept:
            raise UsageError(f"expected texts of at least 2 tokens, got one of {len(ids)}: {_beginning(document)}")
        return kept

    def _piece(self, index: int, ids: list[int], learned: list[bool], start: int) -> Piece:
        window = slice(start, start + self.max_length)
        tokens = torch.tensor(ids[window])
        labels = tokens.masked_fill(~torch.tensor(learned[window]), IGNORED)
        labels[0] = IGNORED
        return Piece(tokens, labels, index)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"the tokenizer makes no token of the text {text[:80]!r}")
        return list(ids)

    def _chat(self, document: Document) -> tuple[list[int], list[bool]]:
        """The tokens of a chat, and whether each is the assistant's, as the template marks them."""
        messages = [message._asdict() for message in document.messages]
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # jinja's own errors, which a template may raise for an order of roles
            raise UsageError(f"the chat template refuses a chat: {error}; the chat: {_beginning(document)}") from error
        return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def require_chat_template(tokenizer: Any) -> None:
    """Raise UsageError unless the tokenizer's chat template marks the assistant's turns."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        came = "none" if template is None else "several"
        raise UsageError(f"--messages-column needs the tokenizer to have one chat template, got {came}")
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise UsageError(
            "--messages-column needs a chat template that marks the assistant's turns by {% generation %}, which tells "
            "what is to be learned; that of this tokenizer does not: write prompts and texts to two columns"
        )


def _beginning(document: Document) -> str:
    return repr((document.prompt or document.text or document.messages[0].content)[:80])
