"""Texts, prompts with their continuations, or chats for a language model, split into training, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.finetune.data import (
    TEST_SHARE,
    VALIDATION_SHARE,
    Cells,
    Splits,
    held_out_ends,
    read_cells,
    whole_text,
)
from neat_kernels.finetune.named_data import TEST, TRAIN, VALIDATION, cells_of, is_file, read_splits
from neat_kernels.finetune.settings import DATA_SUFFIXES, TEXT_SUFFIX, Settings
from neat_kernels.usage import UsageError

LM_SUFFIXES = (TEXT_SUFFIX, *DATA_SUFFIXES)
MIN_DOCUMENTS = 3


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """What is learned: a text, perhaps behind a prompt, or else the assistant's turns of a chat."""

    text: str = ""
    prompt: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class LmColumns:
    """Names of the columns that are read: of texts and perhaps of prompts, or of chats alone."""

    text: str
    prompt: str | None = None
    messages: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """The names by the options that give them, in the order of the cells of a row."""
        if self.messages is not None:
            return {"--messages-column": self.messages}
        prompt = {} if self.prompt is None else {"--prompt-column": self.prompt}
        return {"--text-column": self.text, **prompt}


@dataclass(frozen=True)
class LmData(Splits):
    """A language-model task.

    Args:
        source: where it comes from, in words.
        train: the split that is trained on.
        validation: the split measured during training.
        test: the split measured once, at the end.
        notes: what was left out, in words.
    """

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    notes: tuple[str, ...] = field(default=())

    def plain(self, split: tuple[Document, ...]) -> list[Any]:
        """A hash of each text."""
        return [digest(document) for document in split]


def load_documents(settings: Settings) -> LmData:
    """The texts that --data names, in a file or in a dataset that `datasets` loads.

    A file is split by a hash of each text, so that it always splits alike. A dataset has its own splits, as far as it
    has them: without a test its validation split is the test; what is missing for validation is taken from training.

    Args:
        settings: with the names of the columns.

    Returns:
        The task, with repeated texts dropped.

    Raises:
        UsageError: for an unreadable file, a missing column, an empty text or prompt, a chat that is none, or fewer
            than three different texts.
    """
    assert settings.data is not None, "refused by the settings"
    columns = LmColumns(settings.text_column, settings.prompt_column, settings.messages_column)
    if not is_file(settings.data, LM_SUFFIXES):
        return _load_named(settings.data, columns)
    if settings.data.suffix.lower() == TEXT_SUFFIX and columns != LmColumns("text"):
        option, name = list(columns.options.items())[-1]
        raise UsageError(f"--data {settings.data.name} is text without columns: expected no {option}, got {name!r}")
    cells = read_cells(settings.data, columns.options, LM_SUFFIXES)
    documents, notes = without_repeated(as_documents(settings.data, cells, columns))
    return _split(settings.data.name, documents, notes)


def as_documents(where: object, rows: Sequence[tuple[int, Cells]], columns: LmColumns) -> list[Document]:
    """The documents that rows of cells hold, or UsageError."""
    if columns.messages is not None:
        return [Document(messages=as_chat(where, number, cells[0])) for number, cells in rows]
    documents = []
    for number, (text, *prompt) in rows:
        before = whole_text(where, number, prompt[0]) if prompt else ""
        documents.append(Document(whole_text(where, number, text), before))
    return documents


def as_chat(where: object, row: int, value: object) -> tuple[Message, ...]:
    """The turns of one chat, or UsageError if a turn is more or less than a role and a text."""
    if not isinstance(value, list) or not value:
        got = "an empty list" if isinstance(value, list) else type(value).__name__
        raise UsageError(f"{where}, row {row}: expected a list of messages, got {got}")
    for message in value:
        if not isinstance(message, dict):
            raise UsageError(f"{where}, row {row}: expected messages with role and content, got {message!r:.80}")
        more = [key for key, other in message.items() if key not in Message._fields and other not in (None, [], {}, "")]
        if more or not all(isinstance(message.get(key), str) for key in Message._fields):
            got = f"{more[0]!r} too" if more else repr({key: message.get(key) for key in Message._fields})[:80]
            raise UsageError(f"{where}, row {row}: expected messages with a role and a content, both text; got {got}")
    return tuple(Message(message["role"], message["content"]) for message in value)


def without_repeated(documents: Iterable[Document]) -> tuple[list[Document], tuple[str, ...]]:
    """The documents without repeated ones, and a note on how many were dropped."""
    given = list(documents)
    unique = list(dict.fromkeys(given))
    dropped = len(given) - len(unique)
    return unique, (f"{dropped} repeated texts dropped",) if dropped else ()


def digest(document: Document) -> str:
    """A hash that orders documents the same way on every machine."""
    parts = [document.prompt, document.text, document.messages]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _split(source: str, documents: list[Document], notes: tuple[str, ...]) -> LmData:
    if len(documents) < MIN_DOCUMENTS:
        raise UsageError(
            f"{source}: expected at least {MIN_DOCUMENTS} different texts, got {len(documents)}; "
            f"in a {TEXT_SUFFIX} file blank lines part the texts"
        )
    ordered = sorted(documents, key=digest)
    test, validation = held_out_ends(len(ordered), VALIDATION_SHARE, TEST_SHARE)
    return LmData(source, tuple(ordered[validation:]), tuple(ordered[test:validation]), tuple(ordered[:test]), notes)


def _load_named(data: Path, columns: LmColumns) -> LmData:
    def documents(where: str, rows: Any) -> list[Document]:
        return as_documents(where, cells_of(where, rows, columns.options), columns)

    name, parts, notes = read_splits(data, documents, "rows")
    train, repeated = without_repeated(parts[TRAIN])
    notes += repeated
    if len(parts) == 1:
        return _split(name, train, notes)
    return _with_its_splits(name, sorted(train, key=digest), parts, notes)


def _with_its_splits(
    name: str, train: list[Document], parts: dict[str, list[Document]], notes: tuple[str, ...]
) -> LmData:
    """The task of a dataset that brings a test or a validation split."""
    test = parts.get(TEST) or parts[VALIDATION]
    if TEST in parts and VALIDATION in parts:
        validation = parts[VALIDATION]
    else:
        if len(train) < 2:
            raise UsageError(f"{name}: expected at least 2 different texts in training, got {len(train)}")
        end = min(max(1, round(len(train) * VALIDATION_SHARE)), len(train) - 1)
        train, validation = train[end:], train[:end]
        missing = VALIDATION if TEST in parts else TEST
        notes += (f"no split for {missing}: {VALIDATION_SHARE:.0%} of the training texts are for validation",)
    shared = len(set(train) & {*validation, *test})
    notes += (f"{shared} texts of training are in validation or test too",) if shared else ()
    return LmData(name, tuple(train), tuple(validation), tuple(test), notes)
