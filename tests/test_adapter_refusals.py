"""Adapter folders that are missing, broken, foreign or hostile, and folders that cannot be written."""

import errno
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import neat_kernels as nk
from neat_kernels.adapters import folder as folders
from tests.adapter_problem import adapted, base, full_disk, logits, shake

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.peanut_A.weight"


@pytest.fixture
def saved(tmp_path):
    nk.save_adapter(adapted("llama", depth=1)[0], tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    values = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_tensors(folder, change, metadata=None):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata)


def refused(folder, match, error=nk.AdapterError):
    """Loading raises, and the model is what it was."""
    model = base("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, trainable = str(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        nk.load_adapter(model, folder)
    assert str(model) == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_a_folder(tmp_path, saved):
    refused(tmp_path / "missing", "expected the folder of an adapter, found nothing")
    refused(saved / WEIGHTS, "expected the folder of an adapter, found a file")
    (saved / CONFIG).unlink()
    refused(saved, f"expected a file {CONFIG}, found nothing")


def test_pickles_are_never_opened(saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "exploded"),)

    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(saved, "got adapter_model.bin, which would have to be unpickled")
    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refused(saved, "expected a whole safetensors file")
    assert not (saved / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_weights(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:keep])
    refused(saved, "expected a whole safetensors file, got another")


@pytest.mark.parametrize("size", [10**9, 2**63, 2**64 - 1])
def test_a_header_that_says_it_is_huge(saved, size):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", size) + content[8:])
    refused(saved, "expected a whole safetensors file, got another")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]},
    ],
    ids=["shape", "beyond the file", "backwards", "dtype"],
)
def test_a_header_that_lies(saved, entry):
    header = json.dumps({FIRST: entry}).encode()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(saved, "expected a whole safetensors file, got another")


def test_a_link_into_the_cache_of_a_hub_is_followed(tmp_path, saved):
    (saved / WEIGHTS).rename(tmp_path / "blob")
    (saved / WEIGHTS).symlink_to(tmp_path / "blob")
    nk.load_adapter(base("llama"), saved)


def test_a_pipe_in_the_place_of_a_file(saved):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes")
    (saved / WEIGHTS).unlink()
    os.mkfifo(saved / WEIGHTS)
    refused(saved, f"expected a file {WEIGHTS}, got none")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "expected peft_type PEANUT or NEAT, got None"),
        (b'{"peft_type": "LORA"}', "expected peft_type PEANUT or NEAT, got 'LORA'"),
        (b'{"peft_type": ["PEANUT"]}', "expected peft_type PEANUT or NEAT"),
        (b'{"peft_type": "PEANUT"}', "expected a rank r, got none"),
    ],
    ids=range(9),
)
def test_configurations_that_are_none(saved, content, match):
    (saved / CONFIG).write_bytes(content)
    refused(saved, match)


def test_a_configuration_that_is_huge(saved):
    (saved / CONFIG).write_bytes(b" " * (1 << 25))
    refused(saved, "expected at most 4,194,304 bytes, got 33,554,432")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": "4"}, "r must be an int"),
        ({"r": 0}, "r must be at least 1"),
        ({"depth": -1}, "depth must be at least 0"),
        ({"scaling": float("nan")}, "scaling must be finite"),
        ({"act_fn": 7}, "act_fn must be one of"),
        ({"act_fn": ["relu"]}, "act_fn must be one of"),
        ({"target_modules": 3}, "target_modules must be a list of names"),
        ({"target_modules": "("}, "adapter_config.json"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
        ({"use_dora": True}, "expected fields that this version knows, got use_dora"),
        ({"orientation": "in"}, "expected fields that this version knows, got orientation"),
        ({"r": 5}, r"peanut_A.weight of shape \[4, 32\] instead of \[5, 32\]"),
        ({"depth": 2}, r"no model.layers.0.mlp.down_proj.peanut_encoders.1.weight"),
        ({"depth": 0}, r"peanut_decoders.0.weight, which the adapter does not have"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "names 'model.layers.0.self_attn.k_proj'"),
        ({"modules_to_save": ["lm_head"]}, "no lm_head.weight"),
        ({"modules_to_save": ["q_proj"]}, "does not name 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": ["q_proj", "v_proj"]}, "does not name 'model.layers.0.mlp.down_proj'"),
        ({"layers_to_transform": [1]}, "does not name 'model.layers.0."),
        ({"exclude_modules": ["layers.0.mlp.down_proj"]}, "does not name 'model.layers.0.mlp.down_proj'"),
        ({"exclude_modules": 5}, "exclude_modules must be a list of names, got 5"),
        ({"layers_to_transform": [1], "layers_pattern": {"a": 1}}, "layers_pattern must be a list of names"),
        ({"depth": 10**9}, "expected the tensors of depth 1000000000"),
        ({"scaling": 10**400}, "scaling must be finite"),
    ],
)
def test_configurations_that_do_not_fit(saved, changes, match):
    edit_config(saved, **changes)
    refused(saved, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"orientation": "up"}, "orientation must be one of"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\)"),
        ({"compute_dtype": "load"}, "compute_dtype must be the name of a dtype, got 'load'"),
        ({"compute_dtype": "int8"}, "compute_dtype must be None or one of"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be a dict"),
        ({"rank_pattern": {"(": 3}}, "adapter_config.json"),
        ({"rank_pattern": {"q_proj": 0}}, "r must be at least 1"),
        ({"layer_options": {"model.layers.0.self_attn.q_proj": {"depht": 1}}}, "must hold options of a layer"),
        ({"layer_options": {"model.layers.0.self_attn.q_proj": {"depth": -1}}}, "depth must be at least 0"),
        ({"layer_options": {"model.layers.0.self_attn.q_proj": {"backend": "torch"}}}, "must hold options of a layer"),
        ({"layer_options": {"elsewhere": {"depth": 1}}}, "layer_options names 'elsewhere'"),
        ({"trained_parameters": "x"}, "trained_parameters must be a list"),
        ({"trained_parameters": ["model.norm.bias"]}, "expected parameters of the model that may train"),
        (
            {"trained_parameters": ["model.layers.0.self_attn.q_proj.weight"]},
            "expected parameters of the model that may train",
        ),
    ],
)
def test_configurations_of_type_neat_that_do_not_fit(tmp_path, changes, match):
    nk.save_adapter(adapted("llama", activation="sin")[0], tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **changes)
    refused(tmp_path / "adapter", match)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop(FIRST.replace("_A", "_B")), "no model.layers.0.self_attn.q_proj.peanut_B.weight"),
        (drop(FIRST), "the configuration names 'model.layers.0.self_attn.q_proj', for which there are no tensors"),
        (put("base_model.model.lm_head.weight", torch.zeros(2)), "lm_head.weight, which the adapter does not have"),
        (put("lm_head.weight", torch.zeros(2)), "expected keys that begin with 'base_model.model.', got 'lm_head"),
        (put(FIRST.replace(".0.", ".9."), torch.zeros(4, 32)), "got 'model.layers.9.self_attn.q_proj', which it does"),
        (put(FIRST, torch.zeros(4, 33)), r"of shape \[4, 33\] instead of \[4, 32\]"),
        (put(FIRST, torch.full((4, 32), float("nan"))), "expected finite values of torch.float32 in model.layers.0"),
        (put(FIRST, torch.full((4, 32), float("inf"))), "expected finite values"),
        (put(FIRST, torch.zeros(4, 32, dtype=torch.int32)), "to be convertible to torch.float32, got torch.int32"),
        (
            put(FIRST, torch.zeros(4, 32, dtype=torch.complex64)),
            "to be convertible to torch.float32, got torch.complex",
        ),
        (put(FIRST, torch.zeros(4, 32).to(torch.float8_e4m3fn)), "got torch.float8_e4m3fn"),
        (put(FIRST, torch.full((4, 32), 1e300, dtype=torch.float64)), "expected finite values of torch.float32"),
        (put(FIRST.replace("model.layers.0", "model/../.."), torch.zeros(4, 32)), "expected layers that the model has"),
    ],
    ids=range(13),
)
def test_tensors_that_do_not_fit(saved, change, match):
    edit_tensors(saved, change)
    refused(saved, match)


@pytest.mark.parametrize("metadata", ["[]", "{", '{"base": 3}', '{"base": {"a": 1}}'])
def test_metadata_that_is_none(saved, metadata):
    edit_tensors(saved, lambda tensors: None, {"neat_kernels": metadata})
    refused(saved, "in the metadata")


def test_models_that_the_adapter_does_not_fit(saved):
    refused_by = [
        (nk.apply_neat(base("llama"), nk.NeatConfig(r=4, target_modules=["q_proj"])), "'.*v_proj' has none|has none"),
        (adapted("llama", depth=2)[0], "expected the options of the adapter"),
        (adapted("llama", depth=1, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"])[0], "up_proj' too"),
        (base("roberta"), "expected layers that the model has"),
        (base("llama").to("meta"), "on the meta device"),
    ]
    for model, match in refused_by:
        before = str(model)
        with pytest.raises((nk.AdapterError, ValueError), match=match):
            nk.load_adapter(model, saved)
        assert str(model) == before


def test_what_has_no_adapter_is_not_saved(tmp_path):
    with pytest.raises(nk.AdapterError, match="got none: call apply_neat"):
        nk.save_adapter(base("llama"), tmp_path / "adapter")
    with pytest.raises(nk.AdapterError, match="got a single layer"):
        nk.save_adapter(nk.FusedNeatLinear(4, 4), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_values_that_could_not_be_loaded_do_not_replace_good_ones(tmp_path):
    model, batch = adapted("llama")
    nk.save_adapter(model, tmp_path / "adapter")
    expected = logits(model, batch)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(nk.AdapterError, match=r"q_proj\.neat_A\.weight: expected finite values"):
        nk.save_adapter(model, tmp_path / "adapter", overwrite=True)
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), expected)


def test_a_folder_that_is_there(tmp_path, saved):
    model, _ = adapted("llama")
    with pytest.raises(nk.AdapterError, match="is not empty: expected a new folder, or overwrite=True"):
        nk.save_adapter(model, saved)
    (saved / "optimizer.pt").write_bytes(b"mine")
    with pytest.raises(nk.AdapterError, match=r"got optimizer\.pt too, which replacing the folder would lose"):
        nk.save_adapter(model, saved, overwrite=True)
    (saved / "optimizer.pt").unlink()
    nk.save_adapter(model, saved, overwrite=True)
    assert json.loads((saved / CONFIG).read_text())["depth"] == 0
    (tmp_path / "empty").mkdir()
    nk.save_adapter(model, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(saved, target_is_directory=True)
    for name in ("file", "link"):
        with pytest.raises(nk.AdapterError, match="expected a folder or a free name, got a link or a file"):
            nk.save_adapter(model, tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_inside_the_folder_is_replaced_and_not_followed(tmp_path, saved):
    (tmp_path / "precious").write_text("mine")
    (saved / CONFIG).unlink()
    (saved / CONFIG).symlink_to(tmp_path / "precious")
    nk.save_adapter(adapted("llama")[0], saved, overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (saved / CONFIG).is_symlink()


def one_good_adapter(folder):
    model, batch = adapted("llama")
    nk.save_adapter(model, folder)
    return logits(model, batch), batch


@pytest.mark.parametrize("stage", ["write_json", "write_tensors", "model_card"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, stage):
    expected, batch = one_good_adapter(tmp_path / "adapter")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"neat_kernels.adapters.save.{stage}", full)
    for name, overwrite in (("adapter", True), ("new", False)):
        with pytest.raises(OSError, match="No space left"):
            nk.save_adapter(shake(adapted("llama")[0]), tmp_path / name, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["adapter"]
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), expected)


@pytest.mark.parametrize("room", [100, 3000, 6000])
@pytest.mark.parametrize("write", [nk.save_adapter, nk.export_lora])
def test_a_file_that_the_system_does_not_let_grow(tmp_path, write, room):
    expected, batch = one_good_adapter(tmp_path / "adapter")
    other = shake(adapted("llama")[0])
    for name, overwrite in (("adapter", True), ("new", False)):
        with full_disk(room), pytest.raises(OSError, match=r"File too large|cannot be written"):
            write(other, tmp_path / name, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["adapter"]
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), expected)


def test_where_two_names_cannot_be_exchanged(tmp_path, monkeypatch):
    _, batch = one_good_adapter(tmp_path / "adapter")
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    other = shake(adapted("llama")[0])
    nk.save_adapter(other, tmp_path / "adapter", overwrite=True)
    assert os.listdir(tmp_path) == ["adapter"]
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), logits(other, batch))

    rename = folders.Path.rename

    def interrupted(self, target):
        if target == tmp_path / "adapter" and ".writing-" in str(self):
            raise OSError(errno.EIO, "interrupted")
        return rename(self, target)

    before = logits(other, batch)
    monkeypatch.setattr(folders.Path, "rename", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        nk.save_adapter(shake(other), tmp_path / "adapter", overwrite=True)
    assert torch.equal(logits(nk.load_adapter(base("llama"), tmp_path / "adapter"), batch), before)


def test_an_interrupted_replacement_is_named(tmp_path):
    one_good_adapter(tmp_path / ".adapter.older-x" / "adapter")
    refused(tmp_path / "adapter", r"a save was interrupted here, the adapter from before it is .*older-x/adapter")
