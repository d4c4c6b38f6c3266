"""A trained adapter as a folder: read again here, by PEFT, and as LoRA."""

import copy
import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import neat_kernels as nk


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(tokens).logits


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))
    tokens = torch.randint(0, 128, (2, 16))

    # Trained in practice; drawn here, since a fresh adapter changes nothing.
    model = nk.apply_neat(copy.deepcopy(base), nk.NeatConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for layer in model.modules():
        if isinstance(layer, nk.FusedNeatLinear):
            torch.nn.init.normal_(layer.neat_B)
    trained = logits(model, tokens)

    with tempfile.TemporaryDirectory() as folder:
        print(nk.save_adapter(model, f"{folder}/adapter"))
        print(nk.export_lora(model, f"{folder}/lora", batch={"input_ids": tokens}))
        read = {
            "load_adapter": nk.load_adapter(copy.deepcopy(base), f"{folder}/adapter"),
            "from_lora": nk.from_lora(f"{folder}/lora", copy.deepcopy(base)),
            "PEFT, as PEANUT": PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/adapter"),
            "PEFT, as LoRA": PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/lora"),
        }
    for name, other in read.items():
        error = (logits(other, tokens) - trained).abs().max() / trained.abs().max()
        print(f"{name}: logits differ by {error:.1e} of the largest")
        assert error < 1e-5


if __name__ == "__main__":
    main()
