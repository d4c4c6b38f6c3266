"""A LoRA adapter that stock PEFT saved, run by the kernels of the token side: logits and gradients against PEFT."""

import torch
from harness import DEVICE
from peft import LoraConfig, PeftModel, get_peft_model

import neat_kernels as nk
from tests.adapter_problem import adapted, agree, base, logits, shake


def on_device(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


def test_what_peft_saved_runs_on_the_kernels(tmp_path):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    shake(get_peft_model(base("llama"), config)).save_pretrained(tmp_path / "lora")
    batch = on_device(adapted("llama")[1])
    theirs = PeftModel.from_pretrained(base("llama"), tmp_path / "lora", is_trainable=True).to(DEVICE)
    # An explicit backend runs or raises.
    ours = nk.from_lora(tmp_path / "lora", base("llama").to(DEVICE), backend="triton")
    agree(logits(ours, batch), logits(theirs, batch))
    for model in (ours, theirs):
        model.train()(**batch).loss.backward()
    named = dict(theirs.named_parameters())
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, named[f"base_model.model.{name}.default.weight"].grad, rtol=1e-4, atol=1e-7)
