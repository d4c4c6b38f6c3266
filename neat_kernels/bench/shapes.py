"""The registry of layers that are timed: linear layers of published models, and sets of them with tokens and rank."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

R = 16
# Tokens in a call, from one that is decoded to a long batch; the first five are decoding.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DECODED = TOKENS[:5]


@dataclass(frozen=True)
class LayerShape:
    """One linear layer with an adapter of rank r, and the number of tokens that pass through it."""

    tokens: int
    in_features: int
    out_features: int
    r: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.in_features}x{self.out_features}x{self.r}"

    @classmethod
    def parse(cls, text: str) -> LayerShape:
        """Read "TOKENSxINxOUTxR", for example 2048x1024x1024x16."""
        parts = text.split("x")
        if len(parts) != 4 or not all(re.fullmatch("[0-9]+", part) and int(part) > 0 for part in parts):
            raise ValueError(f"expected a shape TOKENSxINxOUTxR of positive integers, got {text!r}")
        return cls(*map(int, parts))

    @property
    def title(self) -> str:
        """What tables call it: M=2048, 1024→1024, r=16."""
        return f"M={self.tokens}, {self.in_features}→{self.out_features}, r={self.r}"


def _decoder(hidden: int, key_value: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Of a Llama, in_features and out_features by the name in its blocks, equal shapes once."""
    layers = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, key_value),
        "gate_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    if key_value == hidden:
        del layers["k_proj"]
    return layers


def _encoder(names: tuple[str, str, str]) -> dict[str, tuple[int, int]]:
    return dict(zip(names, ((768, 768), (768, 3072), (3072, 768)), strict=True))


# Sizes from the models' published configurations. o_proj is as q_proj, v_proj as k_proj, up_proj as gate_proj.
MODELS = {
    "llama-3.2-1b": _decoder(2048, 512, 8192),
    "llama-3.2-3b": _decoder(3072, 1024, 8192),
    "llama-3-8b": _decoder(4096, 1024, 14336),
    "qwen3-8b": _decoder(4096, 1024, 12288),
    "vit-b": _encoder(("query", "intermediate", "output")),
    "roberta-base": _encoder(("query", "intermediate", "output")),
}
LAYERS = {f"{model}.{name}": sizes for model, layers in MODELS.items() for name, sizes in layers.items()}
REFERENCE_SHAPE = LayerShape(2048, 1024, 1024, R)


def layer(name: str, tokens: int, r: int = R) -> LayerShape:
    """A layer of the registry with `tokens` passing through it.

    Raises:
        ValueError: the registry has none of that name.
    """
    if name not in LAYERS:
        near = difflib.get_close_matches(name, LAYERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected a layer of the registry, such as llama-3-8b.q_proj; got {name!r}{hint}")
    return LayerShape(tokens, *LAYERS[name], r)


SHAPES: dict[str, tuple[LayerShape, ...]] = {
    "cpu": (REFERENCE_SHAPE, LayerShape(512, 768, 3072, R)),
    # Images of 197 patches, texts of 128 tokens, PEFT's own benchmark of 4 × 768, and fewer tokens than W has columns.
    "cpu-eight": (
        layer("roberta-base.query", 4096),
        layer("vit-b.intermediate", 8 * 197),
        layer("llama-3.2-1b.q_proj", 2048),
        layer("llama-3.2-1b.down_proj", 1024),
        layer("llama-3.2-3b.k_proj", 4 * 768),
        layer("llama-3.2-3b.q_proj", 256),
        layer("qwen3-8b.k_proj", 64),
        layer("llama-3-8b.k_proj", 16),
    ),
    "cpu-tokens": tuple(layer("roberta-base.query", M) for M in TOKENS[5:13]),
    "cpu-widths": tuple(LayerShape(1024, width, width, R) for width in (256, 512, 1024, 2048, 3072)),
    "gpu-large": (layer("llama-3-8b.q_proj", 8192), layer("llama-3-8b.gate_proj", 8192)),
    "gpu-small": (layer("roberta-base.query", 2048), layer("llama-3-8b.q_proj", 16)),
    "gpu-tokens": tuple(layer("llama-3-8b.q_proj", M) for M in TOKENS[5:]),
    "gpu-widths": tuple(LayerShape(8192, width, width, R) for width in (768, 1024, 2048, 3072, 4096, 8192)),
    "decoding-1b": tuple(layer("llama-3.2-1b.q_proj", M) for M in DECODED),
    "decoding-8b": tuple(layer("llama-3-8b.q_proj", M) for M in DECODED),
}


def parse_shapes(text: str) -> tuple[LayerShape, ...]:
    """The shapes that `text` spells.

    Args:
        text: TOKENSxINxOUTxR; LAYER@TOKENS or MODEL@TOKENS of the registry, with rank 16 unless xR follows, such as
            llama-3-8b.q_proj@4096x32; or the name of a set of SHAPES.

    Returns:
        One shape, or those of a set or of a model's layers.

    Raises:
        ValueError: it spells none of these.
    """
    if text in SHAPES:
        return SHAPES[text]
    name, at, numbers = text.partition("@")
    if not at:
        return (LayerShape.parse(text),)
    read = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", numbers)
    if read is None:
        raise ValueError(f"expected LAYER@TOKENS or LAYER@TOKENSxR with positive integers, got {text!r}")
    tokens, r = int(read[1]), int(read[2] or R)
    names = [f"{name}.{one}" for one in MODELS[name]] if name in MODELS else [name]
    return tuple(layer(one, tokens, r) for one in names)
