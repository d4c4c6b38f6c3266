"""Labelled texts: read from a file, cleaned of duplicates, split into training, validation and test."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from neat_kernels.finetune.settings import DATA_SUFFIXES, TEXT_SUFFIX
from neat_kernels.usage import UsageError

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2
MIN_ROWS_PER_LABEL = 3

# A text, or two that belong together, such as a question and an answer.
Text = str | tuple[str, str]
Row = tuple[Text, str]
Cells = tuple[object, ...]


class Columns(NamedTuple):
    """Names of the columns that are read; `pair` is that of a second text, None where there is one text a row."""

    text: str
    label: str
    pair: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """The names by the options that give them, in the order of the cells of a row."""
        options = {"--text-column": self.text, "--label-column": self.label}
        return options if self.pair is None else {**options, "--pair-column": self.pair}


@dataclass(frozen=True)
class Split:
    """Texts, or pairs of them, and the index of each one's label."""

    texts: tuple[Text, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


class Splits:
    """What the data of every task have: three splits."""

    train: Any
    validation: Any
    test: Any

    def sizes(self) -> dict[str, int]:
        """Number of texts in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def hashed(self) -> str:
        """A hash of all that the splits hold, in its order."""
        found = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            found.update(json.dumps(self.plain(split)).encode())
        return found.hexdigest()

    def plain(self, split: Any) -> list[Any]:
        """A split as JSON has it."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextData(Splits):
    """A classification task.

    Args:
        source: where it comes from, in words.
        label_names: name of each label index.
        train: the split that is trained on.
        validation: the split measured during training.
        test: the split measured once, at the end.
        notes: what was left out, in words.
    """

    source: str
    label_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    notes: tuple[str, ...] = field(default=())

    def plain(self, split: Split) -> list[Any]:
        """Texts and labels."""
        return [split.texts, split.labels]


def load_file(path: Path, columns: Columns) -> TextData:
    """Read a labelled file and split it by a hash of each text, so that the same file always splits alike.

    Args:
        path: a .csv, .jsonl or .parquet file.
        columns: those of the text, of the label (str, int or bool) and of a second text, if there is one.

    Returns:
        The task, with repeated texts dropped and every label in every split.

    Raises:
        UsageError: for an unreadable file, a missing column, an empty text or label, or too few labels or rows.
    """
    rows = read_rows(path, columns)
    unique, notes = drop_repeated(rows)
    return split_rows(unique, source=path.name, validation=VALIDATION_SHARE, test=TEST_SHARE, notes=notes)


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """The texts of a file with their labels, or UsageError."""
    return [as_row(path, number, cells) for number, cells in read_cells(path, columns.options)]


def read_cells(
    path: Path, columns: Mapping[str, str], suffixes: Sequence[str] = DATA_SUFFIXES
) -> list[tuple[int, Cells]]:
    """The cells of some columns of a file, each row with its number, or UsageError.

    Args:
        path: a file.
        columns: their names by the options that give them.
        suffixes: of the files that can be read.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UsageError(f"--data must end in one of {', '.join(suffixes)}; got {path.name!r}")
    if not path.is_file():
        raise UsageError(f"--data {path} does not exist" if not path.exists() else f"--data {path} is not a file")
    try:
        rows = list(_READERS[suffix](path, columns))
    except UnicodeDecodeError as error:
        raise UsageError(f"--data {path} must be UTF-8 text: {error}") from error
    if not rows:
        raise UsageError(f"--data {path} holds no rows")
    return rows


def read_paragraphs(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Cells]]:
    """Yield the texts of a file, which blank lines part, each with the number of its first line."""
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                lines.append(line)
            elif lines:
                yield number - len(lines), ("".join(lines).rstrip("\n"),)
                lines = []
    if lines:
        yield number + 1 - len(lines), ("".join(lines).rstrip("\n"),)


def read_csv(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Cells]]:
    """Yield line number and cells of a csv file with a header line."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            header = list(reader.fieldnames or ())
            require_columns(path, columns, header)
            for cells in reader:
                if None in cells or None in cells.values():
                    raise UsageError(f"{path}, line {reader.line_num}: expected {len(header)} cells, as in the header")
                yield reader.line_num, tuple(cells[name] for name in columns.values())
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: not valid csv: {error}") from error


def read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Cells]]:
    """Yield line number and cells of a file with one JSON object a line."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(cells, dict):
                raise UsageError(f"{path}, line {number}: expected a JSON object, got {type(cells).__name__}")
            require_columns(f"{path}, line {number}", columns, list(cells))
            yield number, tuple(cells[name] for name in columns.values())


def read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, Cells]]:
    """Yield row number and cells of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError("reading .parquet needs pyarrow: pip install pyarrow") from error
    try:
        require_columns(path, columns, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(columns.values()))
    except pyarrow.ArrowException as error:
        raise UsageError(f"--data {path} is not a readable parquet file: {error}") from error
    yield from enumerate(zip(*(table.column(name).to_pylist() for name in columns.values()), strict=True), start=1)


_READERS: dict[str, Callable[[Path, Mapping[str, str]], Iterator[tuple[int, Cells]]]]
_READERS = {TEXT_SUFFIX: read_paragraphs, ".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def require_columns(where: object, columns: Mapping[str, str], present: list[str]) -> None:
    """Raise UsageError unless each of `columns`, names by their options, is there exactly once."""
    for option, name in columns.items():
        if present.count(name) != 1:
            found = "is there twice" if name in present else "is not there"
            columns_there = ", ".join(map(repr, present)) or "none"
            raise UsageError(f"{where}: {option} {name!r} {found}; columns are {columns_there}")


def as_row(where: object, number: int, cells: Cells) -> Row:
    """A row's text or pair of texts, and its label, or UsageError."""
    text, label, *pair = cells
    first = as_text(where, number, text)
    return (first, as_text(where, number, pair[0])) if pair else first, as_label(where, number, label)


def as_text(path: object, row: int, value: object) -> str:
    """The text of one row without the space around it, or UsageError if it is none or empty."""
    return whole_text(path, row, value).strip()


def whole_text(path: object, row: int, value: object) -> str:
    """The text of one row as it is, or UsageError if it is none or empty."""
    if not isinstance(value, str) or not value.strip():
        got = "an empty text" if isinstance(value, str) else type(value).__name__
        raise UsageError(f"{path}, row {row}: expected a text, got {got}")
    return value


def as_label(path: object, row: int, value: object) -> str:
    """The label of one row as str, or UsageError if it is empty or of another type."""
    if not isinstance(value, (str, int)) or not str(value).strip():
        got = "an empty label" if isinstance(value, str) else f"{type(value).__name__} {value!r}"
        raise UsageError(f"{path}, row {row}: expected a label (text or integer), got {got}")
    return str(value).strip()


def drop_repeated(rows: Iterable[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows without repeated texts (the first one stays), and a note on what was dropped."""
    first: dict[Text, str] = {}
    dropped = conflicting = 0
    for text, label in rows:
        if text in first:
            dropped += 1
            conflicting += first[text] != label
        else:
            first[text] = label
    note = f"{dropped} repeated texts dropped, {conflicting} of them with a different label than the first"
    return list(first.items()), (note,) if dropped else ()


def split_rows(
    rows: Sequence[Row], *, source: str, validation: float, test: float, notes: tuple[str, ...] = ()
) -> TextData:
    """Split rows into training, validation and test, each with the same share of every label.

    Args:
        rows: (text, label) pairs without repeated texts.
        source: where they come from, in words.
        validation: share of each label for validation.
        test: share of each label for the test.
        notes: what was left out before, in words.

    Returns:
        The task; its order depends on the texts alone.

    Raises:
        UsageError: if there are fewer than two labels, or a label has fewer than three rows.
    """
    by_label: dict[str, list[Text]] = defaultdict(list)
    for text, label in rows:
        by_label[label].append(text)
    require_labels(source, {label: len(texts) for label, texts in by_label.items()})
    names = tuple(sorted(by_label))
    parts: dict[str, list[tuple[Text, int]]] = {"test": [], "validation": [], "train": []}
    for index, name in enumerate(names):
        texts = sorted(by_label[name], key=digest)
        ends = held_out_ends(len(texts), validation, test)
        for part, chosen in zip(parts, (texts[: ends[0]], texts[ends[0] : ends[1]], texts[ends[1] :]), strict=True):
            parts[part] += [(text, index) for text in chosen]
    splits = {part: as_split(pairs) for part, pairs in parts.items()}
    return TextData(source, names, splits["train"], splits["validation"], splits["test"], notes)


def require_labels(source: str, counts: dict[str, int]) -> None:
    """Raise UsageError unless there are two labels or more with enough rows each."""
    if len(counts) < 2:
        raise UsageError(f"{source}: expected at least 2 labels, got {len(counts)} ({', '.join(map(repr, counts))})")
    few = Counter({label: n for label, n in counts.items() if n < MIN_ROWS_PER_LABEL})
    if few:
        label, n = few.most_common()[-1]
        raise UsageError(
            f"{source}: expected at least {MIN_ROWS_PER_LABEL} different texts per label; "
            f"{len(few)} of {len(counts)} labels have fewer, such as {label!r} with {n}"
        )


def held_out_ends(count: int, validation: float, test: float) -> tuple[int, int]:
    """Where the test part and the validation part end, at least one row in each and one left for training."""
    test_end = max(1, min(round(count * test), count - 2))
    return test_end, min(test_end + max(1, round(count * validation)), count - 1)


def as_split(pairs: Iterable[tuple[Text, int]]) -> Split:
    """The pairs in an order that mixes the labels and depends on the texts alone."""
    ordered = sorted(pairs, key=lambda pair: digest(pair[0]))
    return Split(tuple(text for text, _ in ordered), tuple(label for _, label in ordered))


def digest(text: Text) -> str:
    """A hash that orders texts the same way on every machine."""
    return hashlib.sha256((text if isinstance(text, str) else "\0".join(text)).encode()).hexdigest()
