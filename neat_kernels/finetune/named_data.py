"""Labelled texts that `datasets` loads by name: a dataset of the hub, or a folder of files."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from neat_kernels.finetune.data import (
    TEST_SHARE,
    VALIDATION_SHARE,
    Cells,
    Columns,
    Row,
    Split,
    Text,
    TextData,
    as_row,
    as_split,
    digest,
    drop_repeated,
    require_columns,
    split_rows,
)
from neat_kernels.finetune.settings import DATA_SUFFIXES
from neat_kernels.usage import UsageError

Item = TypeVar("Item")

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What a split is called whose labels are kept secret: every row has this one.
_HIDDEN = "-1"


def is_file(data: Path, suffixes: Sequence[str] = DATA_SUFFIXES) -> bool:
    """Whether --data means a file that is read here, by its suffix; UsageError for a file of another kind."""
    if data.suffix.lower() in suffixes:
        return True
    if data.is_file():
        known = ", ".join(suffixes)
        raise UsageError(f"--data must end in one of {known}, or be the name of a dataset; got {data.name!r}")
    return False


def load_named(data: Path, columns: Columns) -> TextData:
    """A dataset with its own splits, as far as it has them.

    Args:
        data: NAME or NAME:CONFIGURATION, as `datasets.load_dataset` takes them.
        columns: those of the text, of the label and of a second text, if there is one.

    Returns:
        The task. Of a dataset that has no test, or one without labels, the validation split is the test; what is
        missing for validation is taken from training by a hash of each text, and said in the notes.

    Raises:
        UsageError: `datasets` is not installed or cannot load it, it has no training split or a column is not there, or
            a label is in validation or test that no training text has.
    """
    name, parts, notes = read_splits(data, lambda where, rows: _rows(where, rows, columns), "labelled rows")
    unique, repeated = drop_repeated(parts[TRAIN])
    notes += repeated
    if len(parts) == 1:
        return split_rows(unique, source=name, validation=VALIDATION_SHARE, test=TEST_SHARE, notes=notes)
    return _with_its_splits(name, unique, parts, notes)


def read_splits(
    data: Path, read: Callable[[str, Any], list[Item]], what: str
) -> tuple[str, dict[str, list[Item]], tuple[str, ...]]:
    """The splits of a dataset that hold something, read.

    Args:
        data: the dataset, as --data names it.
        read: from where rows are, in words, and the rows of a split to what they hold.
        what: what a split is made of, in words.

    Returns:
        The dataset's name, what each of train, validation and test holds if anything, and notes of what is not read.

    Raises:
        UsageError: the dataset cannot be loaded or read, or has nothing to train on.
    """
    name, found = load_splits(data)
    parts = {
        split: items
        for split in (TRAIN, VALIDATION, TEST)
        if split in found and (items := read(f"{name}, {split}", found[split]))
    }
    if TRAIN not in parts:
        raise UsageError(f"--data {name}: expected {what} in the split train, got none")
    unread = [split for split in found if split not in parts]
    return name, parts, (f"splits that are not read: {', '.join(unread)}",) if unread else ()


def load_splits(data: Path) -> tuple[str, dict[str, Any]]:
    """The name of a dataset and its splits, one of them for training, or UsageError."""
    name, _, configuration = data.as_posix().partition(":")
    found = _load(name, configuration or None)
    if TRAIN not in found:
        raise UsageError(f"--data {name}: expected a split called train, got {', '.join(found)}")
    return name, found


def cells_of(where: str, split: Any, columns: Mapping[str, str]) -> list[tuple[int, Cells]]:
    """The cells of some columns of a split, each row with its number, or UsageError."""
    require_columns(where, columns, split.column_names)
    return list(enumerate(zip(*(split[name] for name in columns.values()), strict=True), start=1))


def _load(name: str, configuration: str | None) -> dict[str, Any]:
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"--data {name!r} is no file; to load a dataset of that name: pip install datasets")
    import datasets  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_dataset(name, configuration)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"--data must be a file, or a dataset that `datasets` loads; {name!r}: {reason}") from error
    return dict(loaded)


def _rows(where: str, split: Any, columns: Columns) -> list[Row]:
    """The rows of a split, their labels by name; none where labels are hidden."""
    cells_of_rows = cells_of(where, split, columns.options)
    names = getattr(split.features[columns.label], "names", None)
    rows = [as_row(where, number, cells) for number, cells in cells_of_rows]
    if rows and all(label == _HIDDEN for _, label in rows):
        return []
    return rows if names is None else [(text, _label_name(where, names, label)) for text, label in rows]


def _label_name(where: str, names: Sequence[str], label: str) -> str:
    index = int(label)
    if not 0 <= index < len(names):
        raise UsageError(f"{where}: expected labels from 0 to {len(names) - 1}, got {index}")
    return names[index]


def _with_its_splits(name: str, train: list[Row], parts: dict[str, list[Row]], notes: tuple[str, ...]) -> TextData:
    """The task of a dataset that brings a test or a validation split."""
    test = parts.get(TEST) or parts[VALIDATION]
    if TEST in parts and VALIDATION in parts:
        validation = parts[VALIDATION]
    else:
        missing = "validation" if TEST in parts else "test with labels"
        notes += (f"no split for {missing}: {VALIDATION_SHARE:.0%} of the training texts are for validation",)
        train, validation = _held_out(train)
    known = Counter(label for _, label in train)
    if len(known) < 2:
        raise UsageError(f"{name}: expected at least 2 labels in training, got {', '.join(map(repr, known))}")
    _refuse_unseen(name, known, {VALIDATION: validation, TEST: test})
    shared = len({text for text, _ in train} & {text for text, _ in (*validation, *test)})
    notes += (f"{shared} texts of training are in validation or test too",) if shared else ()
    labels = {label: index for index, label in enumerate(sorted(known))}
    of_train, of_validation, of_test = (_indexed(rows, labels) for rows in (train, validation, test))
    return TextData(name, tuple(labels), of_train, of_validation, of_test, notes)


def _held_out(train: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, every label with the same share of both."""
    kept, validation = [], []
    for label in sorted({label for _, label in train}):
        texts: list[Text] = sorted((text for text, other in train if other == label), key=digest)
        end = min(max(1, round(len(texts) * VALIDATION_SHARE)), len(texts) - 1)
        validation += [(text, label) for text in texts[:end]]
        kept += [(text, label) for text in texts[end:]]
    return kept, validation


def _refuse_unseen(name: str, known: Counter[str], held_out: dict[str, list[Row]]) -> None:
    for split, rows in held_out.items():
        unseen = Counter(label for _, label in rows if label not in known)
        if unseen:
            label, count = unseen.most_common(1)[0]
            raise UsageError(
                f"{name}: expected in {split} only labels that training has ({', '.join(map(repr, sorted(known)))}), "
                f"got {len(unseen)} others, such as {label!r} of {count} texts"
            )


def _indexed(rows: list[Row], labels: dict[str, int]) -> Split:
    return as_split((text, labels[label]) for text, label in rows)
