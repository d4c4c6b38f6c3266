"""Read a safetensors file that may be anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from neat_kernels.adapters.description import WEIGHTS_FILE
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.names import PREFIX
from neat_kernels.vocabulary import COMPUTE_DTYPES

_PICKLED = ("adapter_model.bin", "adapter_model.pt")


class Weights:
    """An open adapter_model.safetensors: shapes at once, values when they are asked for.

    Args:
        folder: of the adapter.

    Raises:
        AdapterError: the file is missing, truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = folder / WEIGHTS_FILE
        if not self.path.is_file():
            pickled = [name for name in _PICKLED if (folder / name).exists()]
            got = f"{pickled[0]}, which would have to be unpickled: convert it" if pickled else "none"
            raise AdapterError(f"{folder}: expected a file {WEIGHTS_FILE}, got {got}")
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            self._shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
            self._metadata = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{self.path}: expected a whole safetensors file, got another: {error}") from None
        if bad := [name for name in self._shapes if not name.startswith(PREFIX)]:
            raise AdapterError(f"{self.path}: expected keys that begin with {PREFIX!r}, got {bad[0]!r}")

    def __enter__(self) -> Weights:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.__exit__(kind, error, traceback)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, without the prefix of PEFT."""
        return {name.removeprefix(PREFIX): shape for name, shape in self._shapes.items()}

    def check_keys(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise AdapterError unless the file has these names with these shapes, and no others."""
        shapes = self.shapes
        problems = [f"no {name}" for name in expected if name not in shapes]
        problems += [f"{name}, which the adapter does not have" for name in shapes if name not in expected]
        problems += [
            f"{name} of shape {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != tuple(shape)
        ]
        if problems:
            rest = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise AdapterError(
                f"{self.path}: expected the tensors that the configuration and the model ask for, "
                f"got {'; '.join(problems[:5])}{rest}"
            )

    def read_all(self, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """The values of every tensor, in the dtypes that are expected of them.

        Raises:
            AdapterError: the file has not exactly these names with these shapes, or as in `read`.
        """
        self.check_keys({name: shape for name, (shape, _) in expected.items()})
        return {name: self.read(name, dtype) for name, (_, dtype) in expected.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The values of one tensor in a dtype.

        Raises:
            AdapterError: integers where floating values were expected or the reverse, or values that are not finite in
                that dtype.
        """
        value = self._file.get_tensor(PREFIX + name)
        if _kind(value.dtype) != _kind(dtype):
            raise AdapterError(f"{self.path}: expected {name} to be convertible to {dtype}, got {value.dtype}")
        return self._finite(name, value.to(dtype))

    def _finite(self, name: str, value: Tensor) -> Tensor:
        if value.is_floating_point() and not value.isfinite().all():
            raise AdapterError(f"{self.path}: expected finite values of {value.dtype} in {name}, got NaN or infinity")
        return value

    def read_any(self, name: str) -> Tensor:
        """The values of one tensor as float64.

        Raises:
            AdapterError: values are not finite.
        """
        value = self._file.get_tensor(PREFIX + name)
        if _kind(value.dtype) not in ("floating", "integer", "bool"):
            raise AdapterError(f"{self.path}: expected real values in {name!r}, got {value.dtype}")
        return self._finite(name, value).double()

    def own_metadata(self, key: str) -> dict[str, Any]:
        """The JSON object under a key of the metadata; empty where there is none.

        Raises:
            AdapterError: there is something else under the key.
        """
        try:
            found = json.loads(self._metadata.get(key, "{}"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise AdapterError(f"{self.path}: expected a JSON object under {key!r} in the metadata, got something else")
        return found


def _kind(dtype: torch.dtype) -> str:
    """Dtypes of one kind may be converted to one another; the 8-bit floats are no values without their scales."""
    if dtype in COMPUTE_DTYPES:
        return "floating"
    if dtype == torch.bool:
        return "bool"
    return str(dtype) if dtype.is_floating_point or dtype.is_complex else "integer"
