"""What is built on the Trainer, and what it is built on: TRL's SFTTrainer and accelerate's own loop."""

import copy

import pytest
import torch

import neat_kernels as nk

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
accelerate_library = pytest.importorskip("accelerate")

from models import VOCABULARY, make_case  # noqa: E402
from trainer_problem import TARGETS, WAYS, Texts, adapted, trained  # noqa: E402

from neat_kernels.integrations.parameter_groups import parameter_groups  # noqa: E402
from neat_kernels.integrations.peft import NeatConfig, NeatLinear, accelerate  # noqa: E402
from neat_kernels.integrations.trainer import NeatCallback  # noqa: E402
from neat_kernels.integrations.updates import measure_updates  # noqa: E402

pytestmark = pytest.mark.usefixtures("frozen_garbage")

LENGTHS = (7, 3, 5, 9, 2, 6, 8, 4, 10, 6)
PACKED = 12


def tokenizer():
    """A tokenizer of made-up words, which TRL wants even for data that is tokenized."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w0")


def sft(model, output_dir, trainer=None, **arguments):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    drawn = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(2, VOCABULARY, (n,), generator=drawn).tolist()} for n in LENGTHS]
    options = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": PACKED,
        "packing": True,
        "shuffle_dataset": False,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
        **arguments,
    }
    data = datasets.Dataset.from_list(rows)
    given = {"train_dataset": data, "processing_class": tokenizer(), **(trainer or {})}
    return trl.SFTTrainer(model, args=trl.SFTConfig(**options), **given)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_on_packed_texts_trains_what_stock_peanut_trains(gradient_checkpointing, tmp_path):
    model = adapted("llama", "peanut")
    stock, before = copy.deepcopy(model), trained(model)
    accelerate(stock, undo=True)
    trainer = sft(model, tmp_path, gradient_checkpointing=gradient_checkpointing)
    NeatCallback().attach(trainer)
    trainer.train()
    sft(stock, tmp_path, gradient_checkpointing=gradient_checkpointing).train()
    ours, expected = trained(model), trained(stock)
    assert not any(torch.equal(ours[name], p) for name, p in before.items())
    for name, p in expected.items():
        torch.testing.assert_close(ours[name], p, msg=lambda text, name=name: f"{name}: {text}")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # TRL's own figures are beside ours.
    assert all("mean_token_accuracy" in entry and "neat/delta_norm" in entry for entry in history)
    counted = [round(entry["neat/tokens_per_second"] * entry["neat/step_time_s"]) for entry in history]
    assert sum(counted) == history[-1]["num_tokens"]


@pytest.mark.parametrize("way", ["neat", "fused"])
def test_packed_texts_do_not_see_one_another(way, tmp_path):
    packed = adapted("llama", way)
    apart = copy.deepcopy(packed)
    arguments = {"max_steps": 1, "per_device_train_batch_size": len(LENGTHS)}
    trainer = sft(packed, tmp_path, **arguments)
    assert len(trainer.train_dataset) < len(LENGTHS)
    trainer.train()
    sft(apart, tmp_path, packing=False, **arguments).train()
    expected = trained(apart)
    for name, p in trained(packed).items():
        torch.testing.assert_close(p, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_sft_makes_neat_adapters_itself(tmp_path):
    model, _ = make_case("llama")
    config = NeatConfig(r=4, target_modules=TARGETS["llama"], orientation="in", activation="sin2pi")
    trainer = sft(model, tmp_path, {"peft_config": config})
    NeatCallback().attach(trainer)
    trainer.train()
    layers = [module for module in trainer.model.modules() if isinstance(module, NeatLinear)]
    assert len(layers) == 6
    updates, left_out = measure_updates(trainer.model)
    assert not left_out
    assert all(update.delta_norm > 0 for update in updates.values())
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_an_adapter_that_is_never_called_is_told(tmp_path):
    # TRL multiplies by the weight of lm_head itself; it refuses an adapter of PEFT there, and does not know ours.
    model, _ = make_case("llama")
    nk.apply_neat(model, nk.NeatConfig(r=4, target_modules=["q_proj", "lm_head"]))
    trainer = sft(model, tmp_path)
    NeatCallback().attach(trainer)
    with pytest.warns(UserWarning, match="2 of 6 trained parameters got no gradient .* such as lm_head") as told:
        trainer.train()
    assert sum("got no gradient" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize("name", ["llama", "roberta"])
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_s_loop_trains_what_a_plain_one_trains(way, name):
    model, data = adapted(name, way).double(), Texts(name)
    plain, before = copy.deepcopy(model), trained(model)

    def parts(model):
        groups = parameter_groups(model, lr=0.5, lr_B=0.1)
        return model, torch.optim.SGD(groups), torch.utils.data.DataLoader(data, batch_size=4)

    accelerator = accelerate_library.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer, loader = accelerator.prepare(*parts(model))
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    _, optimizer, loader = parts(plain)
    for i, batch in enumerate(loader):
        (plain(**batch).loss / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    ours, expected = trained(accelerator.unwrap_model(prepared)), trained(plain)
    assert not any(torch.equal(ours[name], p) for name, p in before.items())
    for name, p in expected.items():
        torch.testing.assert_close(ours[name], p, rtol=1e-9, atol=1e-12)
