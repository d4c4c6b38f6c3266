"""NeatConfig: PEFT's configuration of type NEAT, with the fields of a NEAT folder's adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType

from neat_kernels.adapters.names import NEAT, by_pattern
from neat_kernels.options import LayerOptions
from neat_kernels.vocabulary import check_int

_OF_LAYER = ("orientation", "depth", "activation", "scaling", "dropout", "compute_dtype")


@dataclass
class NeatConfig(PeftConfig):
    """Configuration of a Neat adapter under PEFT, of PEFT type NEAT.

    out: ΔWᵀ = s·g(Wᵀ·Aᵀ)·Bᵀ;  in: ΔW = s·g(W·Aᵀ)·Bᵀ

    Args:
        r: rank of every adapted layer that `rank_pattern` does not name.
        target_modules: names or name suffixes, one regex, or "all-linear"; None means PEFT's own for the architecture.
        exclude_modules: names, suffixes or one regex of layers to leave alone.
        orientation: which of W's dimensions A acts on, "out" (PEFT's PEANuT) or "in" (the paper's formula).
        depth: pairs of encoder and decoder layers [r,r] between A and B.
        activation: σ; one of relu, sin2pi, sin, gelu, gelu_tanh, silu, tanh, sigmoid, identity.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x in the adapter branch, in training.
        rank_pattern: rank by regex, which must match a name or its end after a dot.
        layer_options: options (orientation, depth, activation, scaling, dropout, compute_dtype) by full layer name.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the list that is counted.
        modules_to_save: modules that are trained whole beside the adapter.
        init_weights: B starts at zero, an exact no-op; False draws it like A.
        compute_dtype: dtype of the adapter branch over half inputs; None is the input's, "float32" the other one.
        backend: "auto", or "torch" / "triton", which runs or raises; not saved, it is a matter of the machine.
        trained_parameters: must be empty; a folder that `neat_kernels.save_adapter` wrote with others is refused.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not as above.
        NotImplementedError: PEFT is older than 0.21.

    Source: arXiv 2410.01870.
    """

    r: int = 16
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    orientation: str = "out"
    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    layer_options: dict[str, dict[str, Any]] | None = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    compute_dtype: str | torch.dtype | None = None
    backend: str = "auto"
    trained_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NEAT]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.compute_dtype, torch.dtype):
            self.compute_dtype = str(self.compute_dtype).removeprefix("torch.")
        self.rank_pattern, self.layer_options = self.rank_pattern or {}, self.layer_options or {}
        self._check()

    def _check(self) -> None:
        if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
            raise NotImplementedError(
                f"NEAT needs PEFT 0.21 or newer, whose methods name their own tensors in a file; got {peft.__version__}"
            )
        common = self._common()
        for pattern, r in self._patterns().items():
            check_int(f"rank_pattern[{pattern!r}]", r, 1)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern must have regexes as keys, got {pattern!r}: {error}") from None
        for name, own in self._own().items():
            if unknown := sorted(set(own) - set(_OF_LAYER)):
                raise ValueError(
                    f"layer_options[{name!r}] must hold some of {', '.join(_OF_LAYER)}; got {', '.join(unknown)}"
                )
            replace(common, **_with_dtype(own))
        if not isinstance(self.init_weights, bool):
            raise TypeError(f"init_weights must be True or False, got {self.init_weights!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, got None")
        if self.trained_parameters:
            raise ValueError(
                "trained_parameters must be empty under PEFT, which cannot hold parameters beside an adapter's and "
                f"modules_to_save; got {self.trained_parameters!r}: load the folder with neat_kernels.load_adapter"
            )

    def _common(self) -> LayerOptions:
        named = {name: getattr(self, name) for name in ("r", *_OF_LAYER, "backend")}
        return LayerOptions(**_with_dtype(named))

    def _patterns(self) -> Mapping[str, int]:
        return self.rank_pattern or {}

    def _own(self) -> Mapping[str, dict[str, Any]]:
        return self.layer_options or {}

    def of_layer(self, name: str) -> LayerOptions:
        """The options of the layer of that full name."""
        found = by_pattern(self._patterns(), name)
        common = self._common() if found is None else replace(self._common(), r=found[1])
        return replace(common, **_with_dtype(self._own().get(name, {})))

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {name: value for name, value in super().to_dict().items() if name != "backend"}


def _with_dtype(values: Mapping[str, Any]) -> dict[str, Any]:
    name = values.get("compute_dtype")
    if name is None or isinstance(name, torch.dtype):
        return dict(values)
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"compute_dtype must be None or the name of a dtype, got {name!r}")
    return {**values, "compute_dtype": dtype}
