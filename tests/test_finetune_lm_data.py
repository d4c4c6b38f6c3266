"""Texts, prompts and chats for language models: reading, splitting, token ids, what is learned, and packed rows."""

from pathlib import Path

import lm_problem as problem
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_finetune_named_data import hub as hub

from neat_kernels.finetune.lm_batches import IGNORED, Encoder, LmTokens, Piece, pack, require_chat_template
from neat_kernels.finetune.lm_data import Document, Message, load_documents
from neat_kernels.finetune.settings import Settings
from neat_kernels.usage import UsageError

CPU = torch.device("cpu")
TEXTS = [f"text, number {index}\nof two lines" for index in range(40)]
CHAT = [{"role": "user", "content": "cat0"}, {"role": "assistant", "content": "cat1 cat2"}]


def settings(data, **options):
    return Settings(task="lm", model="m", data=data, methods=("neat",), **options)


def write(path, rows):
    """Rows of columns as the suffix says; of .txt the texts alone."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        problem.write_jsonl(path, rows)
    elif path.suffix == ".csv":
        quoted = (",".join(f'"{cell}"' for cell in row.values()) for row in rows)
        path.write_text("\n".join([",".join(rows[0]), *quoted]) + "\n")
    else:
        path.write_text("\n\n \n".join(row["text"] for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, suffix):
    data = load_documents(settings(write(tmp_path / f"a{suffix}", [{"text": text} for text in TEXTS])))
    assert data.sizes() == {"train": 28, "validation": 4, "test": 8}
    assert {document.text for document in (*data.train, *data.validation, *data.test)} == set(TEXTS)
    backward = [{"text": text} for text in [*TEXTS[::-1], TEXTS[3]]]
    again = load_documents(settings(write(tmp_path / "b.jsonl", backward)))
    assert (again.train, again.validation, again.test) == (data.train, data.validation, data.test)
    assert again.notes == ("1 repeated texts dropped",)
    assert again.hashed() == data.hashed()


def test_prompts_keep_the_space_around_them(tmp_path):
    rows = [{"q": f"number {i}: ", "text": f" is {i}"} for i in range(5)]
    data = load_documents(settings(write(tmp_path / "a.jsonl", rows), prompt_column="q"))
    assert {(d.prompt, d.text) for d in (*data.train, *data.validation, *data.test)} == {
        (row["q"], row["text"]) for row in rows
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chats(tmp_path, suffix):
    chats = [{"messages": [{**CHAT[0], "content": f"cat{i}"}, CHAT[1]]} for i in range(5)]
    data = load_documents(settings(write(tmp_path / f"a{suffix}", chats), messages_column="messages"))
    expected = {(Message("user", f"cat{i}"), Message("assistant", "cat1 cat2")) for i in range(5)}
    assert {d.messages for d in (*data.train, *data.validation, *data.test)} == expected


def test_the_splits_of_a_dataset_are_its_own(hub):
    def columns(prefix, count):
        return {"text": [f"{prefix} {i}" for i in range(count)]}

    asked = hub({"train": columns("a", 10), "validation": columns("b", 4), "test": columns("c", 6)}, names=None)
    data = load_documents(settings(Path("some/name")))
    assert asked == [("some/name", None)]
    assert (data.source, data.sizes()) == ("some/name", {"train": 10, "validation": 4, "test": 6})
    hub({"train": columns("a", 40), "validation": columns("b", 4), "more": columns("d", 1)}, names=None)
    data = load_documents(settings(Path("name")))
    assert data.sizes() == {"train": 36, "validation": 4, "test": 4}
    assert {d.text for d in data.test} == set(columns("b", 4)["text"])
    assert data.notes == (
        "splits that are not read: more",
        "no split for test: 10% of the training texts are for validation",
    )
    hub({"train": columns("a", 40)}, names=None)
    assert load_documents(settings(Path("name"))).sizes() == {"train": 28, "validation": 4, "test": 8}
    hub({"train": columns("a", 4), "validation": columns("b", 2), "test": columns("a", 2)}, names=None)
    assert load_documents(settings(Path("name"))).notes == ("2 texts of training are in validation or test too",)
    hub({"train": columns("a", 4)}, names=None)
    hub({"train": {"messages": [[{**CHAT[0], "content": f"cat{i}"}, CHAT[1]] for i in range(4)]}}, names=None)
    chats = load_documents(settings(Path("name"), messages_column="messages"))
    assert {d.messages[1] for d in chats.train} == {Message("assistant", "cat1 cat2")}
    hub({"train": columns("a", 4)}, names=None)
    with pytest.raises(UsageError, match="name, train: --prompt-column 'q' is not there; columns are 'text'"):
        load_documents(settings(Path("name"), prompt_column="q"))


REFUSED = {
    "missing.txt": (None, {}, "does not exist"),
    "a.json": ("{}", {}, r"must end in one of .txt, .csv, .jsonl, .parquet, or be the name of a dataset; got 'a.json'"),
    "empty.txt": (" \n\n", {}, "holds no rows"),
    "empty.csv": ("", {}, "--text-column 'text' is not there; columns are none"),
    "one.txt": ("a b\nc d\n", {}, "at least 3 different texts, got 1; in a .txt file blank lines part the texts"),
    "column.jsonl": ('{"body": "a"}\n', {}, "line 1: --text-column 'text' is not there; columns are 'body'"),
    "prompt.csv": ("text\na\n", {"prompt_column": "q"}, "--prompt-column 'q' is not there; columns are 'text'"),
    "prompt.txt": ("a\n\nb\n\nc", {"prompt_column": "q"}, "text without columns: expected no --prompt-column, got 'q'"),
    "text.txt": ("a\n\nb\n\nc", {"text_column": "q"}, "text without columns: expected no --text-column, got 'q'"),
    "blank.jsonl": ('{"text": " \\n"}\n', {}, "row 1: expected a text, got an empty text"),
    "null.jsonl": ('{"text": null}\n', {}, "row 1: expected a text, got NoneType"),
    "blank.csv": ("text,q\na, \n", {"prompt_column": "q"}, "row 2: expected a text, got an empty text"),
    "chat.jsonl": ('{"m": "a"}\n', {"messages_column": "m"}, "row 1: expected a list of messages, got str"),
    "none.jsonl": ('{"m": []}\n', {"messages_column": "m"}, "expected a list of messages, got an empty list"),
    "word.jsonl": ('{"m": ["a"]}\n', {"messages_column": "m"}, "expected messages with role and content, got 'a'"),
    "role.jsonl": (
        '{"m": [{"role": "user", "content": null}]}\n',
        {"messages_column": "m"},
        "a role and a content, both text; got {'role': 'user', 'content': None}",
    ),
    "tool.jsonl": (
        '{"m": [{"role": "user", "content": "a", "tool_calls": [1]}]}\n',
        {"messages_column": "m"},
        "both text; got 'tool_calls' too",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, name):
    content, options, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_documents(settings(tmp_path / name, **options))


def encode(*documents, length=16, vocabulary=64, **options):
    encoder = Encoder(problem.tokenizer(**options), length, vocabulary)
    return encoder.split(documents), encoder


def words(ids):
    return [problem.NAMES[index] for index in ids]


def test_a_text_begins_and_ends_as_the_tokenizer_says():
    for begins, expected in ((True, ["<s>", "cat0", "cat1", "</s>"]), (False, ["cat0", "cat1", "</s>"])):
        (piece,) = encode(Document("cat0 cat1"), begins=begins)[0].pieces
        assert words(piece.ids.tolist()) == expected
        assert piece.labels.tolist() == [IGNORED, *piece.ids[1:].tolist()]


def test_nothing_of_a_prompt_is_learned_and_all_of_its_text_is():
    (piece,) = encode(Document("dog0 dog1", prompt="cat0 cat1 cat2"))[0].pieces
    assert words(piece.ids.tolist()) == ["<s>", "cat0", "cat1", "cat2", "dog0", "dog1", "</s>"]
    assert piece.labels.tolist() == [IGNORED] * 4 + piece.ids[4:].tolist()


def test_of_a_chat_the_assistant_s_turns_are_learned():
    turns = (*CHAT, {"role": "user", "content": "dog0"}, {"role": "assistant", "content": "dog1"})
    document = Document(messages=tuple(Message(**turn) for turn in turns))
    (piece,) = encode(document, chat_template=problem.CHAT)[0].pieces
    expected = ["user:", "cat0", "assistant:", "cat1", "cat2", "</s>", "user:", "dog0", "assistant:", "dog1", "</s>"]
    assert words(piece.ids.tolist()) == expected
    learned = [word for word, label in zip(expected, piece.labels.tolist(), strict=True) if label != IGNORED]
    assert learned == ["cat1", "cat2", "</s>", "dog1", "</s>"]


def test_long_texts_are_read_in_pieces_and_the_ends_of_long_answers_are_not_read():
    long = Document(" ".join(["cat0"] * 20))
    tokens, encoder = encode(long, length=8)
    assert [len(piece) for piece in tokens.pieces] == [8, 8, 6]
    assert {piece.document for piece in tokens.pieces} == {0}
    assert (encoder.divided, encoder.cut) == (1, 0)
    # 22 tokens in rows of 7: the last one alone has nothing before it.
    assert [len(piece) for piece in encode(long, length=7)[0].pieces] == [7, 7, 7]
    tokens, encoder = encode(Document(long.text, prompt="dog0 dog1"), length=8)
    assert [len(piece) for piece in tokens.pieces] == [8]
    assert (encoder.divided, encoder.cut) == (0, 1)


@pytest.mark.parametrize(
    ("document", "options", "message"),
    [
        (Document("cat0", prompt="dog0 " * 7), {"length": 8}, "--max-length 8: .* got 8 tokens before it: 'dog0"),
        (Document("cat0"), {"vocabulary": 6}, "the model knows 6 token ids; its tokenizer makes 6 of a text"),
        (
            Document(messages=(Message(**CHAT[0]),)),
            {"chat_template": problem.CHAT},
            "an assistant's turn in every chat",
        ),
        (
            Document(messages=(Message(**CHAT[0]),)),
            {"chat_template": "{{ raise_exception('no such order') }}"},
            "the chat template refuses a chat: no such order",
        ),
    ],
)
def test_documents_that_cannot_be_learned_are_refused(document, options, message):
    with pytest.raises(UsageError, match=message):
        encode(document, **options)


def test_texts_of_no_token_or_of_one_are_refused():
    tokenizer = problem.tokenizer(begins=False)
    with pytest.raises(UsageError, match="makes no token of the text"):
        Encoder(tokenizer, 8, 64).split([Document("cat0"), Document("\u2028")])
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="expected texts of at least 2 tokens, got one of 1: 'cat0'"):
        Encoder(tokenizer, 8, 64).split([Document("cat0")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "to have one chat template, got none"),
        ({"default": "a", "tool": "b"}, "to have one chat template, got several"),
        ("{{ messages[0].content }}", "that of this tokenizer does not: write prompts and texts to two columns"),
    ],
)
def test_chat_templates_that_cannot_be_used(template, message):
    tokenizer = problem.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=message):
        require_chat_template(tokenizer)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_packing_loses_nothing_and_overfills_no_row(lengths):
    rows = pack(lengths, 32)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    filled = [sum(lengths[piece] for piece in row) for row in rows]
    assert max(filled) <= 32
    # Of any two rows the pieces would not have fit into one.
    assert len(rows) == 1 or sum(sorted(filled)[:2]) > 32


def tokens_of(*lengths, packed):
    pieces = tuple(
        Piece(torch.arange(10 * i, 10 * i + n), torch.tensor([IGNORED, *range(10 * i + 1, 10 * i + n)]), i)
        for i, n in enumerate(lengths, start=1)
    )
    return LmTokens(pieces, tuple((i,) for i in range(len(lengths))), 9, packed=packed)


def test_a_packed_row_counts_positions_anew_in_each_text_and_in_the_padding():
    packed = tokens_of(3, 2, 4, packed=False).pack(6)
    assert packed.rows == ((2, 1), (0,))
    batch = packed.batch([0, 1], CPU)
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.inputs["input_ids"].tolist() == [[30, 31, 32, 33, 20, 21], [10, 11, 12, 9, 9, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch.labels.tolist() == [[-100, 31, 32, 33, -100, 21], [-100, 11, 12, -100, -100, -100]]
    assert batch.tokens == 9


def test_a_row_of_one_text_is_masked_and_knows_its_text():
    tokens = tokens_of(3, 2, packed=False)
    (batch,) = tokens.in_order_of_length(8, CPU)
    assert batch.inputs["input_ids"].tolist() == [[20, 21, 9], [10, 11, 12]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 21, -100], [-100, 11, 12]]
    assert batch.owners == (2, 1)
