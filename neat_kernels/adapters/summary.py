"""What of a model is trainable."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from neat_kernels.layer import FusedNeatLinear


@dataclass(frozen=True)
class SummaryRow:
    """One module with trainable parameters of its own."""

    name: str
    kind: str
    trainable: int
    frozen: int


@dataclass(frozen=True)
class TrainableSummary:
    """Counts of a model's parameters, and a row per module that trains; str() is a table."""

    trainable: int
    total: int
    rows: tuple[SummaryRow, ...]

    @property
    def fraction(self) -> float:
        """Share of the parameters that is trainable."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        head = f"trainable {self.trainable:,} of {self.total:,} parameters ({self.fraction:.3%})"
        width = max([len(row.name) for row in self.rows], default=0)
        kind = max([len(row.kind) for row in self.rows], default=0)
        lines = [
            f"  {row.name:<{width}}  {row.kind:<{kind}}  {row.trainable:>12,} trained  {row.frozen:>14,} frozen"
            for row in self.rows
        ]
        return "\n".join([head, *lines])


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count a model's trainable parameters, by module.

    Args:
        model: any module; a shared parameter counts once.

    Returns:
        Counts and a table, one row per Neat layer and per other module with trainable parameters of its own.
    """
    rows: list[SummaryRow] = []
    seen: set[int] = set()
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        is_neat = isinstance(module, FusedNeatLinear)
        if is_neat:
            inside.update(id(child) for child in module.modules())
        own = [p for p in module.parameters(recurse=is_neat) if id(p) not in seen]
        seen.update(id(p) for p in own)
        trainable = sum(p.numel() for p in own if p.requires_grad)
        if trainable:
            frozen = sum(p.numel() for p in own) - trainable
            rows.append(SummaryRow(name or type(module).__name__, _kind(module), trainable, frozen))
    parameters = list(model.parameters())
    return TrainableSummary(
        sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters), tuple(rows)
    )


def _kind(module: nn.Module) -> str:
    if not isinstance(module, FusedNeatLinear):
        return type(module).__name__
    depth = f", depth={module.depth}" if module.depth else ""
    return f"Neat r={module.r} {module.orientation} {module.activation}{depth}"
