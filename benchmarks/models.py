"""The models that the benchmarks train, by their published configurations, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Model:
    """A Llama and what it is trained with.

    Args:
        config: arguments of LlamaConfig.
        targets: the linear layers that get an adapter, by the ends of their names.
        r: rank.
        batch: sequences in a step.
        length: tokens of a sequence.
    """

    config: dict[str, Any]
    targets: tuple[str, ...]
    r: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length

    def build(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model, drawn on its device from a fixed seed."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return LlamaForCausalLM(LlamaConfig(**self.config, use_cache=False))
        finally:
            torch.set_default_dtype(before)


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }


# Every linear layer but the output head.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_Q_AND_V = ("q_proj", "v_proj")
MODELS = {
    # meta-llama/Llama-3.2-3B in the setting of PEFT's own benchmark of methods.
    "llama-3.2-3b": Model(_llama(28, 3072, 8192, 24, 8, 128256), _Q_AND_V, r=32, batch=4, length=768),
    # Its width, two layers of it and a small vocabulary, for a CPU.
    "llama-3.2-3b-2-layers": Model(_llama(2, 3072, 8192, 24, 8, 4096), _Q_AND_V, r=32, batch=1, length=256),
    "llama-4x1024": Model(_llama(4, 1024, 2816, 16, 16, 4096), _Q_AND_V, r=32, batch=2, length=256),
}
