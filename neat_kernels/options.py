"""The options of one Neat layer, checked as a whole."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from neat_kernels.vocabulary import (
    ACTIVATIONS,
    BACKENDS,
    ORIENTATIONS,
    check_choice,
    check_compute_dtype,
    check_dropout,
    check_int,
    check_scaling,
)


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The keywords that every way of making a layer shares; creating one checks them.

    Raises:
        TypeError: r, depth or scaling is no number of its kind.
        ValueError: an option is out of range or unknown.
    """

    r: int
    orientation: str
    depth: int
    activation: str
    scaling: float
    dropout: float
    compute_dtype: torch.dtype | None
    backend: str

    @classmethod
    def of(cls, holder: object, **changes: Any) -> LayerOptions:
        """The options that a layer or a configuration has as attributes, with changes."""
        return cls(**{**{f.name: getattr(holder, f.name) for f in fields(cls)}, **changes})

    def __post_init__(self) -> None:
        check_int("r", self.r, 1)
        check_int("depth", self.depth, 0)
        check_choice("orientation", self.orientation, ORIENTATIONS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("backend", self.backend, BACKENDS)
        check_scaling(self.scaling)
        check_dropout(self.dropout)
        check_compute_dtype(self.compute_dtype)
