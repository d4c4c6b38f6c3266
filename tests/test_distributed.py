"""Training under DistributedDataParallel and FSDP, in two processes: what one computes with the whole batch."""

import copy
import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import neat_kernels as nk

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import language_batch, make_case
from processes import WORLD, assert_same_gradients, by_name, in_two_processes, logits, parallel, part_of, whole
from trainer_problem import SGD, WAYS, Texts, adapted, assert_same, loop, trained, trainer_of, under_peft

KINDS = ("ddp", "fsdp2")


def train(rank, way, kind, steps=2):
    plain = adapted("llama", way).double().train()
    model, batch = parallel(copy.deepcopy(plain), kind), language_batch()
    optimizers = [torch.optim.SGD(by_name(m.named_parameters()).values(), lr=1.0) for m in (plain, model)]
    for _ in range(steps):
        plain(**batch).loss.backward()
        model(**part_of(batch, rank)).loss.backward()
        assert_same_gradients(model, plain)
        before = logits(model, batch)
        torch.testing.assert_close(before, logits(plain, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after = logits(model, batch)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, logits(plain, batch))


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
    assert_same_gradients(model, plain)
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


def train_as_accelerate_prepares(rank, way):
    """By the function behind Accelerator.prepare, which does not shard on a CPU: over the meta device and back."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plain, batch = adapted("llama", way).train(), language_batch()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["data"]),
        torch_device_mesh=init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data",)),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
    )
    model = fsdp2_prepare_model(accelerator, copy.deepcopy(plain))
    model(**part_of(batch, rank)).loss.backward()
    plain(**batch).loss.backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("way", WAYS)
def test_sharded_as_accelerate_does(way):
    pytest.importorskip("accelerate", minversion="1.6")
    in_two_processes(train_as_accelerate_prepares, way)


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
    assert_same_gradients(model, plain)


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
    assert_same(trained(model), trained(expected))


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_in_two_processes(way, tmp_path):
    in_two_processes(train_by_trainer, way, tmp_path)
