"""Adapter files of models that two processes share, and what such models cannot do."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neat_kernels as nk

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import language_batch, make_case
from processes import WORLD, by_name, in_two_processes, logits, parallel, part_of, whole
from trainer_problem import adapted, assert_same


def save(rank, folder):
    plain = adapted("llama", "fused").eval()
    model = parallel(copy.deepcopy(plain), "fsdp2")
    saved = nk.save_adapter(model, folder / f"sharded{rank}")
    assert (saved.peft_type, saved.layers) == ("PEANUT", 6)
    nk.save_adapter(plain, folder / f"plain{rank}")
    sharded, whole = (read(folder / name / "adapter_model.safetensors") for name in ("sharded0", f"plain{rank}"))
    assert sharded[1] == whole[1]
    assert all(torch.equal(sharded[0][name], value) for name, value in whole[0].items())


def read(file):
    """The tensors and the metadata, whose order in the file is not always the same."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_an_adapter_is_saved_by_the_first_process(tmp_path):
    in_two_processes(save, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain0", "plain1", "sharded0"]
    base = nk.remove_neat(adapted("llama", "fused"))
    batch, expected = language_batch(), adapted("llama", "fused").eval()
    assert torch.equal(nk.load_adapter(base, tmp_path / "sharded0").eval()(**batch).logits, expected(**batch).logits)


def save_by_peft(rank, way, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    plain, batch = adapted("llama", way).eval(), language_batch()
    model = parallel(copy.deepcopy(plain), "fsdp2")
    values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=values)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, values, options=options)
    assert torch.equal(logits(model, batch), logits(plain, batch))


@pytest.mark.parametrize("way", ["peanut", "neat"])
def test_a_state_dict_of_a_sharded_model_goes_into_pefts_file_and_back(way, tmp_path):
    in_two_processes(save_by_peft, way, tmp_path / "sharded")
    adapted("llama", way).save_pretrained(tmp_path / "whole")
    sharded, whole = (read(tmp_path / name / "adapter_model.safetensors")[0] for name in ("sharded", "whole"))
    assert len(whole) == 24
    assert_same(sharded, whole)


def refuse(rank, folder):
    model, batch = parallel(adapted("llama", "fused"), "fsdp2"), part_of(language_batch(), rank)
    layer = next(m for m in model.modules() if isinstance(m, nk.FusedNeatLinear))
    nk.save_adapter(adapted("llama", "fused"), folder / f"plain{rank}")
    config = nk.NeatConfig(r=2, target_modules=["k_proj"])
    whole_model = "expected a model that is whole in this process, got one that fully_shard"

    def refused():
        for call, error, match in [
            (layer.merge, RuntimeError, "expected a layer whose W is whole"),
            (lambda: nk.export_lora(model, folder / "lora"), nk.AdapterError, whole_model),
            (lambda: nk.load_adapter(model, folder / f"plain{rank}"), nk.AdapterError, whole_model),
            (lambda: nk.merge_neat(model), ValueError, whole_model),
            (lambda: nk.remove_neat(model), ValueError, whole_model),
            (lambda: nk.apply_neat(model, config), ValueError, whole_model),
            (lambda: nk.reuse_features(model).__enter__(), RuntimeError, "q_proj: expected the parameters .* FSDP"),
        ]:
            with pytest.raises(error, match=match):
                call()

    refused()
    for call in (lambda: layer(torch.randn(3, layer.in_features)), layer.lora_factors):
        with pytest.raises(ValueError, match="weight must be whole in this process, got a DTensor"):
            call()
    # Gathered, which it stays until the backward or, without one, the next step.
    model.set_reshard_after_forward(False)
    loss = model(**batch).loss
    assert type(layer.weight) is nn.Parameter
    refused()
    loss.backward()
    assert not (folder / "lora").exists()


def test_what_a_sharded_model_cannot_do_is_refused(tmp_path):
    in_two_processes(refuse, tmp_path)


def unmerge(rank):
    model = adapted("llama", "fused")
    layer = next(m for m in model.modules() if isinstance(m, nk.FusedNeatLinear))
    layer.merge()
    parallel(model, "fsdp2")
    with pytest.raises(RuntimeError, match="expected a layer whose W is whole"):
        layer.unmerge()


def test_a_layer_that_was_sharded_while_merged_cannot_be_unmerged():
    in_two_processes(unmerge)


def save_between_steps(rank, folder):
    """After a forward in eval(), which leaves gathered parameters that are older than the step that follows."""
    model, batch = parallel(adapted("llama", "fused").train(), "fsdp2"), part_of(language_batch(), rank)
    model.set_reshard_after_forward(False)
    optimizer = torch.optim.SGD(by_name(model.named_parameters()).values(), lr=1.0)
    model(**batch).loss.backward()
    logits(model, batch)
    optimizer.step()
    optimizer.zero_grad()
    nk.save_adapter(model, folder / "adapter")
    saved, _ = read(folder / "adapter" / "adapter_model.safetensors")
    for name, p in by_name(model.named_parameters()).items():
        if name.endswith("neat_B"):
            assert torch.equal(saved[f"base_model.model.{name.replace('neat_B', 'peanut_B.weight')}"], whole(p))
    model(**batch).loss.backward()


def test_what_is_saved_is_what_the_last_step_left(tmp_path):
    in_two_processes(save_between_steps, tmp_path)


def fail_to_save(rank, folder):
    model = parallel(adapted("llama", "fused"), "fsdp2")
    # A folder of the first process alone has something in it.
    with pytest.raises(nk.AdapterError, match=r"first is not empty"):
        nk.save_adapter(model, folder / ("first" if rank == 0 else "second"))


def test_a_save_that_fails_in_the_first_process_fails_in_all(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "mine").touch()
    in_two_processes(fail_to_save, tmp_path)
    assert not (tmp_path / "second").exists()


def save_on_a_part_of_a_mesh(rank, folder):
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "other"))["data"]
    model = fully_shard(adapted("llama", "fused"), mesh=mesh)
    nk.save_adapter(model, folder / f"adapter{rank}")


def test_of_several_whole_models_on_one_mesh_the_first_is_saved(tmp_path):
    in_two_processes(save_on_a_part_of_a_mesh, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter0"]


def adapt_too_late(rank, folder):
    model = parallel(adapted("llama", "fused"), "ddp")
    nk.save_adapter(model, folder / f"adapter{rank}")
    torch.distributed.barrier()
    nk.load_adapter(model, folder / "adapter0")
    plain = parallel(make_case("llama")[0], "ddp")
    late = "expected a model before DistributedDataParallel"
    with pytest.raises(ValueError, match=late):
        nk.apply_neat(plain, nk.NeatConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(nk.AdapterError, match=late):
        nk.load_adapter(plain, folder / "adapter0")
    assert all(p.requires_grad for p in plain.parameters())


def test_adapters_go_in_before_ddp_and_the_first_process_saves(tmp_path):
    in_two_processes(adapt_too_late, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter0"]


def reuse(rank):
    model, batch = parallel(adapted("llama", "fused"), "ddp", find_unused_parameters=True), language_batch()
    message = r"reuse_features\(\) cannot be used under DistributedDataParallel"
    with pytest.raises(RuntimeError, match=message), nk.reuse_features(model.module):
        model(**part_of(batch, rank))
    # Not inside its forward the same model reuses features, as the docs say.
    with nk.reuse_features(model.module):
        model.module(**batch).loss.backward()


def test_reused_features_are_refused_under_ddp():
    in_two_processes(reuse)
