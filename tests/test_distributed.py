"""DistributedDataParallel and FSDP over two processes: what one process computes with the whole batch, and refusals."""

import copy
import gc
import re
import weakref

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
from processes import WORLD, in_two_processes, parallel, part_of, whole
from trainer_problem import SGD, WAYS, Texts, adapted, loop, trained, trainer_of, under_peft

KINDS = ("ddp", "fsdp2")


def by_name(parameters):
    """Of the trained parameters, without the names that wrappers put before them."""
    return {name.removeprefix("module."): p for name, p in parameters if p.requires_grad}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def train(rank, way, kind, steps=2):
    plain = adapted("llama", way).double().train()
    model, batch = parallel(copy.deepcopy(plain), kind), language_batch()
    optimizers = [torch.optim.SGD(by_name(m.named_parameters()).values(), lr=1.0) for m in (plain, model)]
    for _ in range(steps):
        plain(**batch).loss.backward()
        model(**part_of(batch, rank)).loss.backward()
        gradients = {name: whole(p.grad) for name, p in by_name(model.named_parameters()).items()}
        same(gradients, {name: p.grad for name, p in by_name(plain.named_parameters()).items()})
        before = logits(model, batch)
        torch.testing.assert_close(before, logits(plain, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after = logits(model, batch)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, logits(plain, batch))


def logits(model, batch):
    """In eval mode, where features are cached if anything is; asked twice, so that a cache would be read."""
    model.eval()
    with torch.no_grad():
        model(**batch)
        found = model(**batch).logits
    model.train()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_two_processes_train_as_one_does(way, kind):
    in_two_processes(train, way, kind)


def train_in_bf16(rank, way):
    """FSDP2 casts the parameters to bf16 and reduces in float32; each block is computed again in the backward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plain, batch = adapted("llama", way).train(), language_batch()
    wrapped = copy.deepcopy(plain)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = parallel(wrapped, "fsdp2", mp_policy=policy)
    model(**part_of(batch, rank)).loss.backward()
    # Buffers stay as they are.
    for p in plain.parameters():
        p.data = p.data.bfloat16()
    has_gradients(model, mean_over_parts(plain, batch))


def mean_over_parts(plain, batch):
    """What the processes' gradients are reduced to in float32."""
    gradients = []
    for part in range(WORLD):
        plain(**part_of(batch, part)).loss.backward()
        gradients.append({name: p.grad.float() for name, p in by_name(plain.named_parameters()).items()})
        plain.zero_grad()
    return {name: sum(g[name] for g in gradients) / WORLD for name in gradients[0]}


def has_gradients(model, expected):
    found = {name: whole(p.grad) for name, p in by_name(model.named_parameters()).items()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_mixed_precision_and_checkpointing_under_fsdp2(way):
    in_two_processes(train_in_bf16, way)


def train_over_half(rank, kind):
    plain, batch = make_case("llama")[0].bfloat16(), language_batch()
    nk.apply_neat(plain, nk.NeatConfig(r=4, target_modules=["q_proj", "v_proj"], activation="gelu", depth=1))
    parameters = by_name(plain.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    for name, p in parameters.items():
        if name.endswith("neat_B"):
            nn.init.normal_(p, std=0.05)
    model = parallel(copy.deepcopy(plain), kind)
    model(**part_of(batch, rank)).loss.backward()
    has_gradients(model, mean_over_parts(plain, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_adapters_over_a_half_model(kind):
    in_two_processes(train_over_half, kind)


def quantised_llama():
    """With q and v in nf4, whose codes lie in a floating dtype, as FSDP needs them."""
    import bitsandbytes as bnb

    model = make_case("llama")[0]
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(block.self_attn, name)
            sizes = linear.in_features, linear.out_features, False
            layer = bnb.nn.Linear4bit(*sizes, torch.float32, quant_type="nf4", quant_storage=torch.float32)
            layer.weight = bnb.nn.Params4bit(
                linear.weight.detach() * 8, quant_type="nf4", quant_storage=torch.float32, module=layer
            )
            setattr(block.self_attn, name, layer.to("cpu"))
    return model


def train_over_4_bits(rank, way):
    torch.manual_seed(0)
    plain = under_peft(quantised_llama(), way, "llama", "gelu", 1, 4, {"target_modules": ["q_proj", "v_proj"]})
    batch = language_batch()
    for name, p in plain.named_parameters():
        if "_B." in name:
            nn.init.normal_(p, std=0.05)
    model = parallel(copy.deepcopy(plain), "fsdp2")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer.weight).__name__ == "DTensor"
    model(**part_of(batch, rank)).loss.backward()
    plain(**batch).loss.backward()
    gradients = {name: whole(p.grad) for name, p in by_name(model.named_parameters()).items()}
    same(gradients, {name: p.grad for name, p in by_name(plain.named_parameters()).items()})
    if way == "neat":
        with pytest.raises(ValueError, match="weight must be whole in this process, got a DTensor"):
            layer.merge()


@pytest.mark.parametrize("way", ["peanut", "neat"])
def test_a_4_bit_base_is_sharded_too(way):
    pytest.importorskip("bitsandbytes")
    in_two_processes(train_over_4_bits, way)


def weigh(rank, way):
    model = adapted("llama", way)
    before = [weakref.ref(p) for p in model.parameters()]
    parallel(model, "fsdp2")
    gc.collect()
    assert not [p for p in (ref() for ref in before) if p is not None]


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_model_leaves_no_whole_parameter(way):
    in_two_processes(weigh, way)


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
    same(sharded, whole)


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


def train_flattened(rank, way):
    plain = adapted("llama", way).double().train()
    model, batch = parallel(copy.deepcopy(plain), "fsdp1"), language_batch()
    optimizers = [torch.optim.SGD(by_name(m.named_parameters()).values(), lr=1.0) for m in (plain, model)]
    before = logits(model, batch)
    for _ in range(2):
        plain(**batch).loss.backward()
        model(**part_of(batch, rank)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(logits(model, batch), logits(plain, batch))
    assert (logits(model, batch) - before).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["peanut", "neat"])
def test_layers_of_peft_train_under_fsdp1(way):
    in_two_processes(train_flattened, way)


def flatten(rank):
    model = parallel(adapted("llama", "fused"), "fsdp1")
    with pytest.raises(ValueError, match=re.escape("shard with fully_shard(), since FSDP1")):
        model(**part_of(language_batch(), rank))


def test_fsdp1_is_refused_since_it_makes_a_frozen_weight_trainable():
    in_two_processes(flatten)


def compiled(rank, way, kind):
    plain, batch = adapted("llama", way).double().train(), language_batch()
    model = parallel(copy.deepcopy(plain), kind)
    model.compile(backend="aot_eager")
    model(**part_of(batch, rank)).loss.backward()
    plain(**batch).loss.backward()
    gradients = {name: whole(p.grad) for name, p in by_name(model.named_parameters()).items()}
    same(gradients, {name: p.grad for name, p in by_name(plain.named_parameters()).items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["neat", "fused"])
def test_compiled(way, kind):
    in_two_processes(compiled, way, kind)


def train_by_trainer(rank, way, folder):
    from neat_kernels.integrations.trainer import NeatCallback

    model, data = adapted("llama", way), Texts("llama")
    expected = copy.deepcopy(model)
    trainer = trainer_of(model, folder, data, per_device_train_batch_size=2, ddp_backend="gloo", **SGD)
    NeatCallback().attach(trainer)
    trainer.train()
    assert type(trainer.model_wrapped) is nn.parallel.DistributedDataParallel
    losses = loop(expected, data)
    if rank == 0:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
        assert all(entry["neat/delta_norm"] > 0 for entry in log)
    same(trained(model), trained(expected))


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_in_two_processes(way, tmp_path):
    in_two_processes(train_by_trainer, way, tmp_path)
