"""The layer shapes that the benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass


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
        if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"expected a shape TOKENSxINxOUTxR of positive integers, got {text!r}")
        return cls(*map(int, parts))


REFERENCE_SHAPE = LayerShape(2048, 1024, 1024, 16)

SHAPES: dict[str, tuple[LayerShape, ...]] = {
    "cpu": (REFERENCE_SHAPE, LayerShape(512, 768, 3072, 16)),
    "gpu-large": (LayerShape(8192, 4096, 4096, 16), LayerShape(8192, 4096, 14336, 16)),
    "gpu-small": (LayerShape(2048, 768, 768, 16), LayerShape(16, 4096, 4096, 16)),
}


def parse_shapes(text: str) -> tuple[LayerShape, ...]:
    """The named set of shapes, or the one shape that `text` spells."""
    return SHAPES.get(text) or (LayerShape.parse(text),)
