"""Whether an adapter is loaded over the base that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.fingerprint import check_plain, fingerprint
from neat_kernels.adapters.names import ADAPTED
from neat_kernels.adapters.parts import Parts

_NAMED = 10


class BaseMismatchWarning(UserWarning):
    """An adapter was loaded over other weights than those that it belongs to."""


def warn_of_other_base(metadata: Mapping[str, Any], parts: Parts, modules: Mapping[str, nn.Module], path: Path) -> None:
    """Warn with a BaseMismatchWarning where a base weight has another hash than the one in the file.

    Args:
        metadata: what the file says of itself; without hashes nothing is checked.
        parts: what the file is about.
        modules: of the model, by name.
        path: of the folder, for the messages.

    Raises:
        AdapterError: the hashes are no hashes.
    """
    known = metadata.get("base", {})
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise AdapterError(f"{path}: expected the hash of each base weight in the metadata, got {str(known)[:80]}")
    trained = _trained_ids(parts, modules)
    other = [name for name in parts.layers if name in known and known[name] != _hash(name, modules[name], trained)]
    if other:
        rest = f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
        warnings.warn(
            f"{path}: the adapter belongs to other base weights than those of {', '.join(other[:_NAMED])}{rest}; "
            "its update is not the one that was trained",
            BaseMismatchWarning,
            stacklevel=3,
        )


def _trained_ids(parts: Parts, modules: Mapping[str, nn.Module]) -> set[int]:
    """Parameters that the file holds: a bias among them is no part of the base, whichever layer it is seen from."""
    split = [name.rpartition(".") for name in parts.trained]
    return {id(modules[parent]._parameters.get(own)) for parent, _, own in split if parent in modules}


def _hash(name: str, module: nn.Module, trained: set[int]) -> str:
    weight = module.base_weight if isinstance(module, ADAPTED) else module.get_parameter("weight")
    bias = module._parameters.get("bias")
    return fingerprint(check_plain(f"{name}.weight", weight), None if id(bias) in trained else bias)
