"""Run a LoRA adapter of PEFT on the kernels of the token side."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neat_kernels.adapters.base_check import warn_of_other_base
from neat_kernels.adapters.base_model import load_base
from neat_kernels.adapters.description import ABOUT, CONFIG_FILE, SELECTION, check_known, check_names, read_config
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.names import ADAPTED, LORA, by_pattern, named_modules, unwrapped
from neat_kernels.adapters.parallel import check_not_copied, check_whole
from neat_kernels.adapters.parts import Parts, described, find_parts, insert_missing, other_tensors, sizes
from neat_kernels.adapters.save import METADATA
from neat_kernels.adapters.weights import Weights
from neat_kernels.lora_layer import FusedLoraLinear
from neat_kernels.options import LayerOptions
from neat_kernels.vocabulary import BACKENDS, check_choice, check_compute_dtype

_READ = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "fan_in_fan_out",
)  # fmt: skip
# Set in every folder of PEFT, and read by it only beside options that are refused here.
_IDLE = {"megatron_core": "megatron.core", "qalora_group_size": 16}
# Ways to begin that leave the base weight as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def from_lora(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
    check_base: bool = True,
) -> nn.Module:
    """Read a LoRA adapter of PEFT into a model whose layers run on the kernels of the token side.

    y = x·Wᵀ + bias + s·x·lora_Aᵀ·lora_Bᵀ with s = lora_alpha/r, or lora_alpha/√r with use_rslora. The adapter is
    trainable; `export_lora` writes it again.

    Args:
        folder: with adapter_config.json of type LORA and adapter_model.safetensors.
        model: the base model, without adapters; changed in place. None loads the one that the configuration names,
            by transformers.
        compute_dtype: dtype of the adapter branch; None is the input's, torch.float32 what PEFT computes in.
        backend: "auto", "torch" or "triton".
        check_base: hash each base weight and warn where it is not the one in the file, if the file has one.

    Returns:
        The model.

    Raises:
        AdapterError: a file is missing, broken or foreign, uses what this layer does not have (DoRA, trained biases,
            other initialisations that change W, ...), or does not fit the model. The model is unchanged then.
        ValueError: a layer of the model cannot be adapted. The model is unchanged then.
        TypeError: a layer of the model is no linear layer. The model is unchanged then.
    """
    check_choice("backend", backend, BACKENDS)
    check_compute_dtype(compute_dtype)
    path = Path(folder)
    values = read_config(path, (LORA,))
    check_lora(path / CONFIG_FILE, values)
    target = load_base(path, values, None) if model is None else model
    check_whole(target, AdapterError)
    check_not_copied(target, AdapterError)
    root = unwrapped(target)
    modules = named_modules(root)
    if adapted := [name for name, module in modules.items() if isinstance(module, ADAPTED)]:
        raise AdapterError(f"expected a model without adapters, got one at {adapted[0]!r}")

    def options(name: str) -> LayerOptions:
        return _options(values, name, compute_dtype, backend)

    with Weights(path) as weights:
        parts = find_parts(values, options, weights, ".lora_A.weight", root)
        others = other_tensors(parts, root)
        read = weights.read_all({**_tensors(parts, modules), **described(others)})
        metadata = weights.own_metadata(METADATA)
    if check_base:
        warn_of_other_base(metadata, parts, modules, path)
    insert_missing(root, parts, _lora_layer)
    inserted = named_modules(root)
    with torch.no_grad():
        for name in parts.layers:
            for which in ("lora_A", "lora_B"):
                inserted[name].get_parameter(which).copy_(read[f"{name}.{which}.weight"])
        for name, tensor in others.items():
            tensor.copy_(read[name])
    return target


def check_lora(path: Path, values: Mapping[str, Any]) -> None:
    """Raise AdapterError for a configuration of type LORA that `from_lora` cannot run, or that no layer can have."""
    idle = [name for name, value in _IDLE.items() if values.get(name) == value]
    check_known(path, values, (*ABOUT, *SELECTION, *_READ, *idle))
    if values.get("bias", "none") != "none":
        raise AdapterError(f"{path}: expected bias 'none', got {values['bias']!r}")
    if values.get("init_lora_weights", True) not in _INITS:
        raise AdapterError(
            f"{path}: expected init_lora_weights that leaves the base weight as it is, "
            f"got {values['init_lora_weights']!r}"
        )
    try:
        check_names(values)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in values.get(name) or {}:
                re.compile(pattern)
        _options(values, "", None, "auto")
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise AdapterError(f"{path}: {error}") from None


def _options(values: Mapping[str, Any], name: str, compute_dtype: torch.dtype | None, backend: str) -> LayerOptions:
    """A LoRA layer's options in the words of a Neat layer: rank, scaling, dropout, dtype and backend."""
    r = _by_pattern(values.get("rank_pattern"), name, values.get("r", 8))
    alpha = _by_pattern(values.get("alpha_pattern"), name, values.get("lora_alpha", 8))
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be an int of at least 1, got {r!r}")
    return LayerOptions(
        r=r,
        orientation="out",
        depth=0,
        activation="identity",
        scaling=alpha / (r**0.5 if values.get("use_rslora") else r),
        dropout=values.get("lora_dropout", 0.0),
        compute_dtype=compute_dtype,
        backend=backend,
    )


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    found = by_pattern(patterns or {}, name)
    return default if found is None else found[1]


def _tensors(parts: Parts, modules: Mapping[str, nn.Module]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, options in parts.layers.items():
        N, K, dtype = sizes(name, modules)
        tensors[f"{name}.lora_A.weight"] = (options.r, K), dtype
        tensors[f"{name}.lora_B.weight"] = (N, options.r), dtype
    return tensors


def _lora_layer(linear: nn.Module, options: LayerOptions) -> nn.Module:
    return FusedLoraLinear(
        linear,
        r=options.r,
        scaling=options.scaling,
        dropout=options.dropout,
        compute_dtype=options.compute_dtype,
        backend=options.backend,
    )
