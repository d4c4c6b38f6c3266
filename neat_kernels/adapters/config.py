"""NeatConfig: which layers of a model are adapted, and how."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from neat_kernels.options import LayerOptions
from neat_kernels.vocabulary import check_int


@dataclass(kw_only=True)
class NeatConfig:
    """Which layers of a model are adapted, and how.

    Args:
        r: rank of every adapted layer that `rank_pattern` does not name.
        target_modules: names or name suffixes of the layers, or one regex that must match a whole name, or "all-linear"
            for every linear layer but the output head.
        exclude_modules: names or suffixes, or one regex, of layers to leave alone.
        orientation: "out" or "in".
        depth: encoder-decoder pairs.
        activation: σ.
        scaling: s.
        dropout: probability in [0, 1).
        rank_pattern: rank by regex; the regex must match a name or its end after a dot.
        layers_to_transform: index or indices of the layers to adapt, counted by the first number in a name.
        layers_pattern: name(s) of the list that is counted, where the first number is not the one meant.
        modules_to_save: names or suffixes of modules that are trained whole beside the adapter.
        compute_dtype: dtype of the adapter branch; None is the input's.
        backend: "auto", "torch" or "triton".

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not as above.
    """

    r: int = 16
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    orientation: str = "out"
    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    modules_to_save: Collection[str] | None = None
    compute_dtype: torch.dtype | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.layer_options(self.r)
        for pattern, r in self.rank_pattern.items():
            check_int(f"rank_pattern[{pattern!r}]", r, 1)
        if not self.target_modules:
            raise ValueError(
                f"target_modules must name layers, be a regex or 'all-linear'; got {self.target_modules!r}"
            )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got the string {self.modules_to_save!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _check_names(name, getattr(self, name))
        for pattern in self.rank_pattern:
            _check_regex("rank_pattern", pattern)
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers_to_transform is None:
            if self.layers_pattern:
                raise ValueError("layers_pattern needs layers_to_transform, got None")
            return
        regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if regex:
            raise ValueError(
                "layers_to_transform goes with a list of target_modules, got the regex " + repr(self.target_modules)
            )
        for index in self.layer_indices():
            check_int("layers_to_transform", index, 0)

    def layer_indices(self) -> tuple[int, ...]:
        """layers_to_transform as a tuple, empty for "every layer"."""
        if self.layers_to_transform is None:
            return ()
        return (
            (self.layers_to_transform,)
            if isinstance(self.layers_to_transform, int)
            else tuple(self.layers_to_transform)
        )

    def layer_options(self, r: int) -> LayerOptions:
        """The options of a layer of rank r."""
        return LayerOptions.of(self, r=r)


def _check_names(field_name: str, value: Collection[str] | str | None) -> None:
    if isinstance(value, str):
        _check_regex(field_name, value)
        return
    for name in value or ():
        if not isinstance(name, str):
            raise TypeError(f"{field_name} must hold strings, got {name!r} of type {type(name).__name__}")


def _check_regex(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field_name} must be a valid regex, got {pattern!r}: {error}") from None
