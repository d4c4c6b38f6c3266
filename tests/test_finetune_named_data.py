"""Data that `datasets` loads by name, and pairs of texts."""

import json
from pathlib import Path

import finetune_problem as problem
import pytest
from rich.console import Console

from neat_kernels.finetune import load_classifier
from neat_kernels.finetune.data import Columns, load_file
from neat_kernels.finetune.named_data import is_file, load_named
from neat_kernels.finetune.run import run
from neat_kernels.finetune.settings import Settings
from neat_kernels.usage import UsageError

datasets = pytest.importorskip("datasets")

COLUMNS = Columns("text", "label")


def rows(prefix, count, labels=(0, 1)):
    return {"text": [f"{prefix} {i}" for i in range(count)], "label": [labels[i % len(labels)] for i in range(count)]}


@pytest.fixture
def hub(monkeypatch):
    """Make splits, {name: columns}, what any name loads; returns what was asked for."""
    asked = []

    def serve(splits, names=("no", "yes")):
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names or ["none"]))}
        features = datasets.Features(kinds) if names else None
        made = {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in splits.items()}
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *arguments: (asked.append(arguments), datasets.DatasetDict(made))[1]
        )
        return asked

    return serve


def texts(split):
    return set(split.texts)


def test_the_splits_of_the_dataset_are_its_own(hub):
    asked = hub({"train": rows("a", 10), "validation": rows("b", 4), "test": rows("c", 6), "extra": rows("d", 2)})
    data = load_named(Path("some/name:part"), COLUMNS)
    assert asked == [("some/name", "part")]
    assert data.source == "some/name"
    assert data.label_names == ("no", "yes")
    assert (texts(data.train), texts(data.validation), texts(data.test)) == tuple(
        {f"{prefix} {i}" for i in range(count)} for prefix, count in (("a", 10), ("b", 4), ("c", 6))
    )
    assert all(label == int(text.split()[1]) % 2 for text, label in zip(data.test.texts, data.test.labels, strict=True))
    assert data.notes == ("splits that are not read: extra",)


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_what_is_missing_for_validation_comes_from_training(hub, held_out):
    hub({"train": rows("a", 40), held_out: rows("b", 4)})
    data = load_named(Path("name"), COLUMNS)
    assert texts(data.test) == {f"b {i}" for i in range(4)}
    assert data.sizes() == {"train": 36, "validation": 4, "test": 4}
    assert not texts(data.train) & texts(data.validation)
    assert set(data.validation.labels) == {0, 1}
    assert "10% of the training texts are for validation" in data.notes[0]


def test_a_test_without_labels_is_none(hub):
    hub({"train": rows("a", 40), "validation": rows("b", 4), "test": rows("c", 6, labels=(-1,))})
    data = load_named(Path("name"), COLUMNS)
    assert texts(data.test) == {f"b {i}" for i in range(4)}
    assert data.notes[0] == "splits that are not read: test"


def test_training_alone_is_split_as_a_file_is(hub, tmp_path):
    hub({"train": rows("a", 40)})
    data = load_named(Path("name"), COLUMNS)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {i}", "label": ("no", "yes")[i % 2]}) + "\n" for i in range(40)))
    same = load_file(path, COLUMNS)
    assert (data.train, data.validation, data.test) == (same.train, same.validation, same.test)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_training_has_not_is_refused(hub, split):
    splits = {"train": rows("a", 10), "validation": rows("b", 4), "test": rows("c", 6)}
    splits[split]["label"][1:3] = [2, 2]
    hub(splits, names=("no", "yes", "maybe"))
    with pytest.raises(UsageError, match=f"in {split} only labels that training has .*'maybe' of 2 texts"):
        load_named(Path("name"), COLUMNS)


def test_texts_in_two_splits_are_told(hub):
    hub({"train": rows("a", 10), "validation": rows("b", 4), "test": rows("a", 2)})
    assert load_named(Path("name"), COLUMNS).notes == ("2 texts of training are in validation or test too",)


@pytest.mark.parametrize(
    ("splits", "names", "message"),
    [
        ({"test": rows("a", 4)}, ("no", "yes"), "expected a split called train, got test"),
        ({"train": rows("a", 4, labels=(-1,))}, ("no", "yes"), "expected labelled rows in the split train"),
        ({"train": rows("a", 4, labels=(1,)), "test": rows("b", 2)}, ("no", "yes"), "at least 2 labels in training"),
        (
            {"train": {"body": ["a"], "label": [1]}},
            None,
            "--text-column 'text' is not there; columns are 'body', 'label'",
        ),
        ({"train": {"text": ["a", ""], "label": [1, 0]}}, None, "train, row 2: expected a text, got an empty text"),
        ({"train": {"text": ["a"], "label": [0.5]}}, None, "row 1: expected a label .* got float 0.5"),
    ],
)
def test_datasets_that_are_refused(hub, splits, names, message):
    hub(splits, names)
    with pytest.raises(UsageError, match=message):
        load_named(Path("name"), COLUMNS)


def test_a_name_that_nothing_has(monkeypatch, tmp_path):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *arguments: (_ for _ in ()).throw(FileNotFoundError("no such"))
    )
    with pytest.raises(UsageError, match="must be a file, or a dataset that `datasets` loads; 'name': no such"):
        load_named(Path("name"), COLUMNS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install datasets"):
        load_named(Path("name"), COLUMNS)


def test_what_is_a_file(tmp_path):
    assert is_file(Path("missing.csv"))
    assert not is_file(Path("org/name"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"or be the name of a dataset; got 'a.txt'"):
        is_file(tmp_path / "a.txt")


def test_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 4)):
        lines = (f"{split} {i},{('no', 'yes')[i % 2]}\n" for i in range(count))
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    data = load_named(folder, COLUMNS)
    assert data.sizes() == {"train": 18, "validation": 2, "test": 4}
    assert data.label_names == ("no", "yes")


PAIRS = Columns("text", "label", "second")


def write_pairs(path):
    """A pair is labelled by whether its texts are of one kind."""
    with path.open("w") as stream:
        for index in range(120):
            kinds = index % 3, index % 3 if index % 2 else (index + 1) % 3
            first, second = (f"{problem.WORDS[12 * kind + index % 12]} {index}" for kind in kinds)
            stream.write(json.dumps({"text": first, "second": second, "label": ("other", "same")[index % 2]}) + "\n")
    return path


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pairs_from_file_to_classifier(tmp_path, kind):
    model = problem.save_model(tmp_path / "model", kind)
    settings = Settings(
        model=str(model),
        data=write_pairs(tmp_path / "pairs.jsonl"),
        pair_column="second",
        methods=("neat",),
        target_modules=("query", "value") if kind == "bert" else ("q_proj", "v_proj"),
        steps=3,
        batch_size=8,
        output=tmp_path / "out",
    )
    run(settings, Console(quiet=True))
    classifier = load_classifier(tmp_path / "out" / "neat")
    assert classifier.task.pairs
    there, back = classifier.probabilities([("cat1", "dog1 dog2"), ("dog1 dog2", "cat1")])
    assert not there.equal(back)
    with pytest.raises(UsageError, match=r"trained on pairs: expected \(text, text\) each, got 'cat1'"):
        classifier(["cat1"])


def test_the_second_text_has_its_own_type(tmp_path):
    from neat_kernels.finetune.batches import encode

    encoded = encode([("cat1 cat2", "dog1"), ("cat1", "dog1 dog2 dog3")], problem.tokenizer(), 5)
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 5]
    assert all(len(types) == 5 and sum(types) for types in encoded["token_type_ids"])
    assert set(encode(["cat1"], problem.tokenizer(), 5)) == {"input_ids"}


def test_pairs_that_differ_in_one_text_are_different_texts(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"same,{i},{i % 2}\n" for i in range(20)] + ["same,0,1\n"]
    path.write_text("text,second,label\n" + "".join(lines))
    data = load_file(path, PAIRS)
    assert sum(data.sizes().values()) == 20
    assert data.notes == ("1 repeated texts dropped, 1 of them with a different label than the first",)
    assert ("same", "3") in {text for split in (data.train, data.validation, data.test) for text in split.texts}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\n", "--pair-column 'second' is not there; columns are 'text', 'label'"),
        ("text,second,label\na,,b\n", "row 2: expected a text, got an empty text"),
    ],
)
def test_refused_pairs(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_file(tmp_path / "a.csv", PAIRS)


def test_columns_must_differ():
    with pytest.raises(UsageError, match="must differ, got text, label, text"):
        Settings(pair_column="text").check()
    with pytest.raises(UsageError, match="--pair-column names a column of --data, which was not given"):
        Settings.from_options({"pair_column": "second"})


def test_a_classifier_of_texts_takes_no_pairs(tmp_path):
    model = problem.save_model(tmp_path / "model")
    data = problem.write_jsonl(tmp_path / "rows.jsonl", problem.rows())
    run(
        Settings(model=str(model), data=data, methods=("probe",), steps=2, batch_size=8, output=tmp_path / "out"),
        Console(quiet=True),
    )
    classifier = load_classifier(tmp_path / "out" / "probe")
    assert not classifier.task.pairs
    with pytest.raises(UsageError, match="trained on texts: expected a text each"):
        classifier([("cat1", "dog1")])
