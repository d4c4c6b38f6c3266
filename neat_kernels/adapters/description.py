"""What an adapter is apart from its values, and adapter_config.json, which says so."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.names import ACT_FN, ACTIVATION, NEAT, PEANUT, by_pattern, naming
from neat_kernels.options import LayerOptions
from neat_kernels.vocabulary import nearest

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
_MAX_CONFIG_BYTES = 1 << 22

# What every configuration of PEFT has and what says nothing about how the adapter computes.
ABOUT = (
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "init_weights", "runtime_config",
)  # fmt: skip
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_OPTIONS = {
    PEANUT: ("r", "depth", "act_fn", "scaling"),
    NEAT: (
        "r", "orientation", "depth", "activation", "scaling", "dropout", "compute_dtype", "rank_pattern",
        "layer_options", "trained_parameters",
    ),
}  # fmt: skip
# Not in a file: which backend runs is a matter of the machine.
_DEFAULTS: dict[str, Any] = {
    "orientation": "out", "depth": 0, "activation": "relu", "scaling": 1.0, "dropout": 0.0, "compute_dtype": None,
    "backend": "auto",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an adapter is apart from its values.

    Args:
        layers: the options of every adapted layer by its full name.
        modules_to_save: full names of the modules that are trained whole.
        trained_parameters: full names of other parameters that are trained, such as biases of adapted layers.
        base: name or folder of the base model; None where it is not known.
        task_type: PEFT's name of the task; None where there is none.
        auto_mapping: class and library of the model, as PEFT writes them.
        unsupported: why stock PEFT cannot express the adapter, beside what the options say.
    """

    layers: Mapping[str, LayerOptions]
    modules_to_save: tuple[str, ...] = ()
    trained_parameters: tuple[str, ...] = ()
    base: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    unsupported: tuple[str, ...] = field(default=())

    def reasons_against_peanut(self) -> list[str]:
        """Why PEFT's PEANUT cannot express the adapter; empty where it can."""
        options = list(self.layers.values())
        reasons = list(self.unsupported)
        if any(o.orientation != "out" for o in options):
            reasons.append("orientation 'in'")
        if names := sorted({o.activation for o in options} - set(ACT_FN)):
            reasons.append(f"activation {', '.join(names)}")
        if any(o.dropout for o in options):
            reasons.append("dropout")
        if any(o.compute_dtype is not None for o in options):
            reasons.append("compute_dtype")
        for name in ("r", "depth", "activation", "scaling"):
            if len({getattr(o, name) for o in options}) > 1:
                reasons.append(f"layers that differ in {name}")
        if self.trained_parameters:
            reasons.append(f"trained parameters beside the adapter, such as {self.trained_parameters[0]}")
        return reasons

    def as_config(self, every: Collection[str]) -> dict[str, Any]:
        """The content of adapter_config.json, of type PEANUT where that can express it, else NEAT.

        Args:
            every: full names of all modules of the model.
        """
        common = common_options(self.layers.values())
        about = {
            "auto_mapping": self.auto_mapping,
            "base_model_name_or_path": self.base,
            "revision": None,
            "task_type": self.task_type,
            "inference_mode": True,
        }
        selection = {
            "target_modules": naming(self.layers, every),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": list(self.modules_to_save) or None,
        }
        if not self.reasons_against_peanut():
            options: dict[str, Any] = {
                "r": common.r,
                "depth": common.depth,
                "act_fn": ACT_FN[common.activation],
                "scaling": common.scaling,
                "init_weights": True,
            }
            return {"peft_type": PEANUT, **about, **options, **selection}
        return {"peft_type": NEAT, **about, **self._neat_options(common), **selection}

    def _neat_options(self, common: LayerOptions) -> dict[str, Any]:
        shared = _plain(common)
        overrides = {}
        for name, options in self.layers.items():
            if other := {key: v for key, v in _plain(options).items() if v != shared[key] and key != "r"}:
                overrides[name] = other
        # Anchored, so that no other name that ends alike is meant.
        ranks = {f"^{re.escape(name)}": o.r for name, o in self.layers.items() if o.r != common.r}
        trained = list(self.trained_parameters)
        return {**shared, "rank_pattern": ranks, "layer_options": overrides, "trained_parameters": trained}


@dataclass(frozen=True)
class Config:
    """A checked adapter_config.json of type PEANUT or NEAT."""

    values: Mapping[str, Any]
    peft_type: str
    common: LayerOptions

    def options(self, name: str) -> LayerOptions:
        """The options of the layer of that full name."""
        found = by_pattern(self.values.get("rank_pattern") or {}, name)
        common = self.common if found is None else replace(self.common, r=found[1])
        own = (self.values.get("layer_options") or {}).get(name, {})
        return replace(common, **_from_plain(own))


def common_options(options: Collection[LayerOptions]) -> LayerOptions:
    """The options that most layers have, with the rank that most layers have."""
    alike = Counter(replace(o, r=1, backend="auto") for o in options).most_common(1)[0][0]
    return replace(alike, r=Counter(o.r for o in options).most_common(1)[0][0])


def read_config(folder: Path, types: Collection[str] = (PEANUT, NEAT)) -> dict[str, Any]:
    """adapter_config.json of one of the types.

    Raises:
        AdapterError: it is missing, unreadable, or of another type.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterError(f"{folder}: expected the folder of an adapter, found {_what(folder)}{_interrupted(folder)}")
    if not path.is_file():
        raise AdapterError(f"{folder}: expected a file {CONFIG_FILE}, found {_what(path)}")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: expected at most {_MAX_CONFIG_BYTES:,} bytes, got {path.stat().st_size:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: expected JSON, got something else: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if values.get("peft_type") not in types:
        raise AdapterError(f"{path}: expected peft_type {' or '.join(types)}, got {values.get('peft_type')!r}")
    return values


def check_known(path: Path, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise AdapterError for a field that is set and that nothing here reads."""
    unread = [name for name, value in values.items() if name not in known and value not in (None, False, [], {}, "")]
    if unread:
        close = ", ".join(f"{name[:40]} (like {nearest(name, known, 1)[0]})" for name in unread[:5])
        rest = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        raise AdapterError(f"{path}: expected fields that this version knows, got {close}{rest}")


def checked_config(folder: Path, values: Mapping[str, Any]) -> Config:
    """The configuration of a folder of type PEANUT or NEAT.

    Raises:
        AdapterError: an unknown field, or a value that no layer can have.
    """
    path = folder / CONFIG_FILE
    peft_type = values["peft_type"]
    check_known(path, values, (*ABOUT, *SELECTION, *_OPTIONS[peft_type]))
    named = {name: values[name] for name in ("r", "depth", "scaling") if name in values}
    if "r" not in named:
        raise AdapterError(f"{path}: expected a rank r, got none")
    try:
        if peft_type == PEANUT:
            common = LayerOptions(**{**_DEFAULTS, **named, "activation": _activation(values.get("act_fn", "relu"))})
        else:
            options = {name: values[name] for name in (*_DEFAULTS, "r") if name in values}
            common = LayerOptions(**{**_DEFAULTS, **_from_plain(options)})
        config = Config(values, peft_type, common)
        _check_shapes_of_fields(values)
        for name in values.get("layer_options") or {}:
            config.options(name)
        for r in (values.get("rank_pattern") or {}).values():
            replace(common, r=r)
    except (TypeError, ValueError, re.error) as error:
        raise AdapterError(f"{path}: {error}") from None
    return config


def _check_shapes_of_fields(values: Mapping[str, Any]) -> None:
    for name, kind in (("rank_pattern", dict), ("layer_options", dict), ("trained_parameters", list)):
        if not isinstance(values.get(name) or kind(), kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(values[name]).__name__}")
    for pattern in values.get("rank_pattern") or {}:
        re.compile(pattern)
    for name, own in (values.get("layer_options") or {}).items():
        if not isinstance(own, dict) or set(own) - (set(_DEFAULTS) - {"backend"}):
            raise TypeError(f"layer_options[{name!r}] must hold options of a layer, got {own!r}")
    check_names(values)


def check_names(values: Mapping[str, Any]) -> None:
    """Raise unless the names of layers, modules and parameters are what they must be: lists, or one valid regex."""
    layers = ("target_modules", "exclude_modules", "layers_pattern")
    for name in (*layers, "modules_to_save", "trained_parameters"):
        entries = values.get(name) or []
        if isinstance(entries, str) and name in layers:
            re.compile(entries)
        elif not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise TypeError(f"{name} must be a list of names, got {entries!r}")


def _activation(act_fn: Any) -> str:
    if not isinstance(act_fn, str) or act_fn not in ACTIVATION:
        raise ValueError(f"act_fn must be one of {', '.join(ACTIVATION)}; got {act_fn!r}")
    return ACTIVATION[act_fn]


def _plain(options: LayerOptions) -> dict[str, Any]:
    values = {name: value for name, value in asdict(options).items() if name != "backend"}
    dtype = options.compute_dtype
    return {**values, "compute_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}


def _from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    name = values.get("compute_dtype")
    if name is None:
        return dict(values)
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"compute_dtype must be the name of a dtype, got {name!r}")
    return {**values, "compute_dtype": dtype}


def _what(path: Path) -> str:
    return "nothing" if not path.exists() else "a folder" if path.is_dir() else "a file"


def _interrupted(folder: Path) -> str:
    older = sorted(folder.parent.glob(f".{folder.name}.older-*/{folder.name}")) if folder.parent.is_dir() else []
    return f"; a save was interrupted here, the adapter from before it is {older[0]}" if older else ""
