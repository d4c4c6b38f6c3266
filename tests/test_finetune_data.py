"""Reading labelled texts, splitting them, and the docstring corpus."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from neat_kernels.files import write_atomically
from neat_kernels.finetune import corpus
from neat_kernels.finetune.data import Columns, held_out_ends, load_file, split_rows
from neat_kernels.usage import UsageError

PAIRS = [(f"text, number {index}\nof two lines", ("yes", "no")[index % 2]) for index in range(40)]


def write(path, pairs, text="text", label="label"):
    if path.suffix == ".parquet":
        columns = {text: [pair[0] for pair in pairs], label: [pair[1] for pair in pairs]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({text: a, label: b}) + "\n" for a, b in pairs))
    else:
        path.write_text(f"{text},{label}\n" + "".join(f'"{a}",{b}\n' for a, b in pairs))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    data = load_file(write(tmp_path / f"a{suffix}", PAIRS, "body", "kind"), Columns("body", "kind"))
    assert data.label_names == ("no", "yes")
    assert data.sizes() == {"train": 28, "validation": 4, "test": 8}
    splits = (data.train, data.validation, data.test)
    read = {(text, data.label_names[label]) for s in splits for text, label in zip(s.texts, s.labels, strict=True)}
    assert read == set(PAIRS)
    reference = load_file(write(tmp_path / "b.jsonl", PAIRS), Columns("text", "label"))
    assert (data.train, data.validation, data.test) == (reference.train, reference.validation, reference.test)


def test_row_order_changes_nothing(tmp_path):
    forward = load_file(write(tmp_path / "a.csv", PAIRS), Columns("text", "label"))
    backward = load_file(write(tmp_path / "a2.csv", PAIRS[::-1]), Columns("text", "label"))
    assert (forward.train, forward.validation, forward.test) == (backward.train, backward.validation, backward.test)


@pytest.mark.parametrize("count", [3, 4, 5, 9, 10, 1000])
def test_every_split_gets_a_row_of_every_label(count):
    data = split_rows(
        [(f"{label} {i}", label) for label in "ab" for i in range(count)], source="s", validation=0.1, test=0.2
    )
    for split in (data.train, data.validation, data.test):
        assert set(split.labels) == {0, 1}
    assert sum(data.sizes().values()) == 2 * count
    test_end, validation_end = held_out_ends(count, 0.1, 0.2)
    assert 0 < test_end < validation_end < count


def test_repeated_texts_are_in_one_split_and_told(tmp_path):
    repeated = [*PAIRS, *PAIRS[:5], (PAIRS[0][0], "no")]
    data = load_file(write(tmp_path / "a.jsonl", repeated), Columns("text", "label"))
    texts = [text for split in (data.train, data.validation, data.test) for text in split.texts]
    assert len(texts) == len(set(texts)) == len(PAIRS)
    assert data.notes == ("6 repeated texts dropped, 1 of them with a different label than the first",)


def test_integer_and_boolean_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"t {i}", "label": i % 2 if i < 20 else i % 2 == 0}) + "\n" for i in range(40))
    )
    assert load_file(path, Columns("text", "label")).label_names == ("0", "1", "False", "True")


REFUSED = {
    "missing.csv": (None, "does not exist"),
    "a.txt": ("text,label\n", r"must end in one of .csv, .jsonl, .parquet; got 'a.txt'"),
    "header.csv": ("text,label\n", "holds no rows"),
    "empty.csv": ("", "'text' is not there; columns are none"),
    "column.csv": ("text,other\na,b\n", "--label-column 'label' is not there; columns are 'text', 'other'"),
    "twice.csv": ("text,label,text\na,b,c\n", "'text' is there twice"),
    "ragged.csv": ("text,label\na,b\nc\n", "line 3: expected 2 cells"),
    "long.csv": ("text,label\na,b,c\n", "line 2: expected 2 cells"),
    "quote.csv": ('text,label\n"a,b\n', "not valid csv"),
    "blank.csv": ("text,label\n  ,b\n", "row 2: expected a text, got an empty text"),
    "label.csv": ("text,label\na,\n", "row 2: expected a label .* got an empty label"),
    "broken.jsonl": ('{"text": "a", "label": 1}\n{"text"\n', "line 2: not valid JSON"),
    "list.jsonl": ("[1]\n", "line 1: expected a JSON object, got list"),
    "column.jsonl": ('{"text": "a"}\n', "line 1: --label-column 'label' is not there; columns are 'text'"),
    "number.jsonl": ('{"text": 3, "label": "a"}\n', "row 1: expected a text, got int"),
    "null.jsonl": ('{"text": "a", "label": null}\n', "row 1: expected a label .* got NoneType"),
    "float.jsonl": ('{"text": "a", "label": 0.5}\n', "row 1: expected a label .* got float 0.5"),
    "single.csv": ("text,label\na,x\nb,x\nc,x\n", r"expected at least 2 labels, got 1 \('x'\)"),
    "rare.csv": ("text,label\na,x\nb,x\nc,x\nd,y\n", "at least 3 different texts per label; 1 of 2 .* 'y' with 1"),
    "broken.parquet": ("not parquet", "is not a readable parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, name):
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_file(tmp_path / name, Columns("text", "label"))


def test_refused_encoding_and_folder(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(UsageError, match="must be UTF-8"):
        load_file(tmp_path / "latin.csv", Columns("text", "label"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="is not a file"):
        load_file(tmp_path / "folder.csv", Columns("text", "label"))
    path = write(tmp_path / "b.parquet", PAIRS, label="kind")
    with pytest.raises(UsageError, match="--label-column 'label' is not there; columns are 'text', 'kind'"):
        load_file(path, Columns("text", "label"))
    path = write(tmp_path / "a.parquet", [*PAIRS, (None, "yes")])
    with pytest.raises(UsageError, match="row 41: expected a text, got NoneType"):
        load_file(path, Columns("text", "label"))


def test_masking_hides_every_spelling_of_a_library():
    text = "NumPy np.array torch.nn PyTorch TorchScript PeftModel hf_hub Hugging Face Hub nx.Graph plt mpl pyplot SymPy"
    masked = corpus.mask(text).lower()
    for name in ("numpy", "np.", "torch", "peft", "hugging", "hub", "nx.", "plt", "mpl", "pyplot", "sympy"):
        assert name not in masked
    assert corpus.mask("inputs, github, transformer and output") == "inputs, github, transformer and output"


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Two installed libraries that must not be imported, and a cache folder of their own."""
    for name, count in (("alphalib", 30), ("betalib", 50)):
        package = tmp_path / "site" / name
        (package / "tests").mkdir(parents=True)
        functions = "".join(f'def f{i}():\n    """{doc(name, i)}"""\n' for i in range(count))
        (package / "__init__.py").write_text(f'raise RuntimeError("imported")\n{functions}')
        (package / "tests" / "test_x.py").write_text(
            f'"""This docstring of a test must never be in the corpus of {name}."""'
        )
        (package / "template.py").write_text("def {{ broken }}")
        metadata = tmp_path / "site" / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(corpus, "LIBRARIES", ("alphalib", "betalib"))
    monkeypatch.setenv("NEAT_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def doc(name, index):
    """Every third docstring is the same in both libraries but for a number, and so is told from neither."""
    word = chr(ord("a") + index // 26) + chr(ord("a") + index % 26)
    return f"{'Both' if index % 3 == 0 else name} say {word} of torch and of a few other things besides {index}."


def all_texts(data):
    return [text for split in (data.train, data.validation, data.test) for text in split.texts]


def test_corpus_is_read_without_imports_masked_and_without_shared_texts(libraries):
    data = corpus.load_docstrings()
    assert not {"alphalib", "betalib"} & set(sys.modules)
    texts = all_texts(data)
    assert len(texts) == len(set(texts))
    assert not [text for text in texts if "torch" in text or "docstring of a test" in text]
    # Of 30 and 50 docstrings, 10 are in both; the 7 that only betalib has of that kind stay.
    assert len(texts) == 20 + 40
    assert data.label_names == ("alphalib", "betalib")


def test_corpus_is_cached_and_a_damaged_cache_is_read_anew(libraries):
    read = []
    first = corpus.load_docstrings(read.append)
    assert read == ["alphalib", "betalib"]
    assert corpus.load_docstrings(read.append) == first
    assert len(read) == 2
    (cached,) = (libraries / "cache").iterdir()
    cached.write_text(cached.read_text()[:100])
    assert corpus.load_docstrings(read.append) == first
    assert len(read) == 4
    metadata = libraries / "site" / "alphalib-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    corpus.load_docstrings(read.append)
    assert len(read) == 6


def test_a_cache_that_cannot_be_written_is_told(libraries):
    (libraries / "cache").write_text("a file where the folder should be")
    data = corpus.load_docstrings()
    assert "could not be cached" in data.notes[0]


def test_a_library_that_is_not_installed_is_refused(libraries, monkeypatch):
    monkeypatch.setattr(corpus, "LIBRARIES", ("alphalib", "gammalib"))
    with pytest.raises(UsageError, match=r"gammalib is not installed: pip install .* or name a file with --data"):
        corpus.load_docstrings()


def test_the_real_corpus_has_the_size_it_promises(tmp_path, monkeypatch):
    monkeypatch.setenv("NEAT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus, "LIBRARIES", ("peft", "networkx"))
    data = corpus.load_docstrings()
    texts = all_texts(data)
    assert len(set(map(corpus.beginning, texts))) == len(texts)
    assert 1100 <= len(texts) <= 2 * corpus.TEXTS_PER_LIBRARY
    assert all(corpus.MIN_CHARACTERS <= len(text) <= corpus.MAX_CHARACTERS for text in texts)
    assert not [text for text in texts if "networkx" in text.lower() or "peft" in text.lower()]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "atomic", b"content")
    assert (tmp_path / "atomic").read_bytes() == b"content"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
