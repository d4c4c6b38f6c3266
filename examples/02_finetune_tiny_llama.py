"""A whole model: put Neat layers into a (randomly initialised) Llama, train them, merge them, take them out again."""

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import neat_kernels as nk


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def counting_batch() -> Tensor:
    """Sequences that count upwards from a random start: easy to learn, impossible to guess."""
    return (torch.randint(0, 64, (8, 1)) + torch.arange(16)) % 64


def main() -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    base = copy.deepcopy(model)
    batch = counting_batch()

    config = nk.NeatConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], scaling=2.0)
    nk.apply_neat(model, config)
    print(nk.trainable_summary(model))
    with torch.no_grad():
        assert torch.equal(model(batch).logits, base(batch).logits), "an untrained adapter changes nothing"

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        sequences = counting_batch()
        loss = model(sequences, labels=sequences).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    assert losses[-1] < 0.8 * losses[0]

    model.eval()
    with torch.no_grad():
        trained = model(batch).logits
        merged = nk.merge_neat(copy.deepcopy(model))
        difference = (merged(batch).logits - trained).norm() / trained.norm()
        print(f"merged: {type(merged.model.layers[0].self_attn.q_proj).__name__}, outputs differ by {difference:.1e}")
        assert difference < 1e-5

        nk.remove_neat(model)
        assert torch.equal(model(batch).logits, base(batch).logits), "removing the adapters restores the base model"
    print("removed: the model computes what it did before")


if __name__ == "__main__":
    main()
