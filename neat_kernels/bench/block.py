"""One transformer block of a Llama as a problem: every linear layer of it adapted, attention and norms around them."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.bench.contenders import CONTENDERS, Contender, Layer
from neat_kernels.bench.problem import Problem, Update, delta, draw_adapters, unit_roundoff
from neat_kernels.bench.shapes import LayerShape, R

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a Llama's block, from its published configuration."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int


BLOCKS = {
    "llama-3.2-1b": BlockSizes(2048, 8192, 32, 8),
    "llama-3.2-3b": BlockSizes(3072, 8192, 24, 8),
    "llama-3-8b": BlockSizes(4096, 14336, 32, 8),
}


class Block(nn.Module):
    """A decoder layer with its rotary embedding, from hidden states [1,M,hidden] to hidden states."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(
            num_hidden_layers=1,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_value_heads,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's hidden states, each position attending to those before it."""
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        out = self.layer(hidden, position_embeddings=self.rotary(hidden, positions), position_ids=positions)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True, eq=False)
class BlockProblem(Problem):
    """A block, adapters for its linear layers, hidden states and the gradient that arrives from above.

    `weight` and `bias` are of no layer of it.

    Args:
        block: frozen; every contender gets a copy.
        layers: for each linear layer, by its name in the block, A and B of each kind of update.
    """

    block: Block | None = None
    layers: dict[str, dict[Update, tuple[Tensor, Tensor]]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block, x and dy."""
        return self.x.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the frozen weights."""
        return sum(parameter.nbytes for parameter in self.frozen_block.parameters())

    @property
    def frozen_block(self) -> Block:
        """The block."""
        assert self.block is not None
        return self.block

    @property
    def adapted(self) -> dict[str, dict[Update, tuple[Tensor, Tensor]]]:
        """The adapters by layer."""
        assert self.layers is not None
        return self.layers

    def tolerance(self, update: Update, name: str) -> float:
        """Twice the error of W + ΔW in plain torch in the problem's dtype, and eight roundings.

        A block rounds in some twenty places that are not the layers' own, so that no bound could be counted out.
        """
        plain, exact = self._plain(update), self.answer(update)
        error = float((plain[name].double() - exact[name]).norm() / exact[name].norm())
        return 2 * error + 8 * unit_roundoff(self.dtype)

    def _answer(self, update: Update) -> dict[str, Tensor]:
        return self._run(copy.deepcopy(self.frozen_block).double(), update, torch.float64)

    def _plain(self, update: Update) -> dict[str, Tensor]:
        key: Any = f"{update}, in the problem's dtype"
        if key not in self.answers:
            self.answers[key] = self._run(self.frozen_block, update, self.dtype)
        return self.answers[key]

    def _run(self, block: Block, update: Update, dtype: torch.dtype) -> dict[str, Tensor]:
        """y and every gradient through dense updates."""
        leaves = {"dx": self.x.detach().to(dtype).requires_grad_()}
        weights = {}
        for name, adapters in self.adapted.items() if update != "none" else ():
            A, B = (t.to(dtype).requires_grad_() for t in adapters[update])
            leaves |= {f"dA {name}": A, f"dB {name}": B}
            weight = block.get_parameter(f"{name}.weight")
            weights[f"{name}.weight"] = weight + delta(update, weight, A, B)
        y = torch.func.functional_call(block, weights, (leaves["dx"],))
        gradients = torch.autograd.grad(y, tuple(leaves.values()), self.dy.to(dtype))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def make_block_problem(model: str, tokens: int, r: int, dtype: torch.dtype, device: torch.device) -> BlockProblem:
    """Draw a block with its adapters and inputs, the same at every call.

    Args:
        model: key of BLOCKS.
        tokens: of the one sequence.
        r: rank of the adapters.
        dtype: of the block, x and dy.
        device: where the tensors live; they are drawn on the CPU.

    Returns:
        The problem, no B zero.
    """
    sizes = BLOCKS[model]
    block = Block(sizes).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    block = block.to(dtype)
    layers = {
        name: {
            update: (A.to(device), B.to(device))
            for update, (A, B) in draw_adapters(linear.weight.detach(), r, generator).items()
        }
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }
    x, dy = (torch.randn(1, tokens, sizes.hidden, generator=generator).to(device, dtype) for _ in range(2))
    block = block.to(device)
    weight = block.layer.self_attn.q_proj.weight
    shape = LayerShape(tokens, sizes.hidden, sizes.hidden, r)
    return BlockProblem(shape, weight, weight, x.requires_grad_(), dy, {}, block=block, layers=layers)


def _frozen(problem: BlockProblem, block: Block) -> nn.Module:
    return block


def _neat(problem: BlockProblem, block: Block) -> nn.Module:
    import neat_kernels as nk

    return nk.apply_neat(block, nk.NeatConfig(r=problem.shape.r, target_modules=list(TARGETS)))


def _peft(problem: BlockProblem, block: Block, method: str, autocast_adapter_dtype: bool = True) -> nn.Module:
    import peft

    r = problem.shape.r
    config: Any
    if method == "lora":
        config = peft.LoraConfig(r=r, lora_alpha=r, bias="none", target_modules=list(TARGETS))
    else:
        config = peft.PeanutConfig(r=r, depth=0, act_fn="relu", scaling=1.0, target_modules=list(TARGETS))
    peft.get_peft_model(block, config, autocast_adapter_dtype=autocast_adapter_dtype)
    # The adapters are in the block itself now; the model around it is not the block's cost.
    return block


def _accelerated(problem: BlockProblem, block: Block) -> nn.Module:
    from neat_kernels.integrations.peft import accelerate

    adapted = _peft(problem, block, "peanut")
    accelerate(adapted)
    return adapted


_ADAPT: dict[str, Callable[[BlockProblem, Block], nn.Module]] = {
    "frozen": _frozen,
    "neat": _neat,
    "neat_half": lambda problem, block: _neat(problem, block).to(problem.dtype),
    "accelerated": _accelerated,
    "peft_lora": functools.partial(_peft, method="lora"),
    "peft_lora_half": functools.partial(_peft, method="lora", autocast_adapter_dtype=False),
    "peft_peanut": functools.partial(_peft, method="peanut"),
}


# The contenders that adapt a block.
ADAPTED = tuple(_ADAPT)


def parse_block(text: str) -> tuple[str, LayerShape]:
    """Read MODEL@TOKENS or MODEL@TOKENSxR, rank 16 unless it is given: a model of BLOCKS, and what it is timed with.

    Raises:
        ValueError: it is not spelt so, or the model is none of BLOCKS.
    """
    read = re.fullmatch(r"(.+)@([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if read is None or read[1] not in BLOCKS:
        raise ValueError(f"expected MODEL@TOKENS or MODEL@TOKENSxR of {', '.join(BLOCKS)}; got {text!r}")
    hidden = BLOCKS[read[1]].hidden
    return read[1], LayerShape(int(read[2]), hidden, hidden, int(read[3] or R))


def contender(name: str) -> Contender:
    """The contender of the registry with a block in the place of its layer.

    Raises:
        ValueError: it has no block.
    """
    if name not in _ADAPT:
        raise ValueError(f"expected a contender that adapts a block ({', '.join(_ADAPT)}), got {name!r}")
    one = CONTENDERS[name]
    needs = {**one.needs, "transformers": ("LlamaConfig",)}
    return Contender(name, one.label, one.update, functools.partial(_build, one), needs, one.half_only, one.alone)


def _build(one: Contender, problem: Any) -> Layer:
    block = _ADAPT[one.name](problem, copy.deepcopy(problem.frozen_block))
    trainable: dict[str, nn.Parameter] = {}
    for name, adapters in problem.adapted.items() if one.update != "none" else ():
        A, B = _parameters(block.get_submodule(name))
        with torch.no_grad():
            for parameter, value in zip((A, B), adapters[one.update], strict=True):
                parameter.copy_(value)
        trainable |= {f"dA {name}": A, f"dB {name}": B}
    return Layer(block, trainable, caches=one.name in ("neat", "neat_half", "accelerated"))


def _parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapted linear layer, ours or PEFT's."""
    for kind in ("peanut", "lora"):
        if isinstance(getattr(layer, f"{kind}_A", None), nn.ModuleDict):
            return getattr(layer, f"{kind}_A")["default"].weight, getattr(layer, f"{kind}_B")["default"].weight
    return layer.neat_A, layer.neat_B
