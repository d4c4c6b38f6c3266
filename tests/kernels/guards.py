"""Two watches over memory: guard bands around everything a kernel is handed, and the address of every access.

The bands work on a GPU too. The addresses are the interpreter's alone, and show what bands cannot: a read beyond a
tensor whose value is masked away later, and two programs at one element.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# Elements on each side: more than a tile that is stored without its mask can reach in these tests.
BAND = 1 << 15
SENTINEL = -0x0123456789ABCDEF
_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.zeros.default,
        torch.ops.aten.zeros_like.default,
    }
)


def _filler(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point:
        return float("nan")
    return SENTINEL >> (64 - torch.iinfo(dtype).bits)


class _Banded:
    """A tensor that is a view inside a larger buffer, and the buffer as it was when made."""

    def __init__(self, like: Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        # A multiple of 64 elements keeps the alignment that the allocator gives.
        self.buffer = torch.full((2 * BAND + extent,), _filler(like.dtype), dtype=like.dtype, device=like.device)
        self.view = self.buffer.as_strided(like.shape, like.stride(), BAND)

    def seal(self) -> None:
        """Remember the surround of the view, and the view itself."""
        self._sealed = self.buffer.clone()

    def assert_only_view_changed(self, name: str) -> None:
        now, before = self.buffer.clone(), torch.full_like(self.buffer, _filler(self.buffer.dtype))
        now.as_strided(self.view.shape, self.view.stride(), BAND).fill_(_filler(now.dtype))
        assert _same(now, before), f"the surround of {name} was written"

    def assert_unchanged(self, name: str) -> None:
        assert _same(self.buffer, self._sealed), f"{name} or its surround was written"


def _filled(t: Tensor) -> Tensor:
    return t.isnan() if t.is_floating_point() else t == _filler(t.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) if a.is_floating_point() else a.equal(b)


class GuardBands(TorchDispatchMode):
    """Inside, every allocation is a view in a larger buffer of NaN; `check` holds them all to account.

    Inputs go through `input` first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inputs: list[_Banded] = []
        self.allocated: list[_Banded] = []

    def input(self, t: Tensor | None) -> Tensor | None:
        """The same values and strides inside guard bands; they must not change."""
        if t is None or t.numel() == 0:
            return t
        banded = _Banded(t)
        banded.view.copy_(t)
        banded.seal()
        self._inputs.append(banded)
        return banded.view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _ALLOCATIONS or result.numel() == 0:
            return result
        banded = _Banded(result)
        if "zeros" in func._schema.name:
            banded.view.zero_()
        self.allocated.append(banded)
        return banded.view

    def check(self) -> None:
        """Inputs as they were, surrounds untouched, and every allocation written to the last element."""
        for i, banded in enumerate(self._inputs):
            banded.assert_unchanged(f"input {i}")
        for banded in self.allocated:
            name = f"the {banded.view.dtype} allocation {tuple(banded.view.shape)}"
            banded.assert_only_view_changed(name)
            assert not _filled(banded.view).any(), f"{name} was not fully written"


class _Launch:
    """The elements of a launch's tensors, and which programs read and wrote each: programs run in no order."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self) -> None:
        self.allow([])

    def allow(self, tensors: list[Tensor]) -> None:
        self.addresses = np.unique(np.concatenate([np.empty(0, np.int64), *map(_element_addresses, tensors)]))
        self.readers = np.full(len(self.addresses), self.NOBODY)
        self.writers = np.full(len(self.addresses), self.NOBODY)

    def load(self, program: int, pointers: np.ndarray, mask: np.ndarray) -> None:
        at = self._elements("load", pointers, mask)
        self._refuse(self.writers[at], program, "read what another program wrote")
        known = self.readers[at]
        self.readers[at] = np.where((known == self.NOBODY) | (known == program), program, self.SEVERAL)

    def store(self, program: int, pointers: np.ndarray, mask: np.ndarray) -> None:
        at = self._elements("store", pointers, mask)
        if len(np.unique(at)) != len(at):
            raise IndexError("one store wrote an element twice")
        self._refuse(self.writers[at], program, "wrote what another program wrote")
        self._refuse(self.readers[at], program, "wrote what another program read")
        self.writers[at] = program

    def _elements(self, what: str, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        wanted = np.asarray(pointers).astype(np.int64)[np.broadcast_to(mask, np.shape(pointers)).astype(bool)]
        at = np.searchsorted(self.addresses, wanted)
        outside = np.append(self.addresses, -1)[at] != wanted
        if outside.any():
            raise IndexError(f"{what} of {outside.sum()} elements outside the tensors of the launch")
        return at

    def _refuse(self, owners: np.ndarray, program: int, what: str) -> None:
        if ((owners != self.NOBODY) & (owners != program)).any():
            raise IndexError(f"a program {what}")


def _program(builder: Any) -> int:
    (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
    return x + nx * (y + ny * z)


def _element_addresses(t: Tensor) -> np.ndarray:
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return t.data_ptr() + offsets * t.element_size()


@contextlib.contextmanager
def checked_addresses() -> Iterator[None]:
    """Inside, an interpreted kernel raises IndexError if it touches anything but elements of its own arguments.

    It raises too where its result would depend on the order of programs, or of the elements of one store.
    """
    executor, builder, launch = interpreter.GridExecutor, interpreter.InterpreterBuilder, _Launch()
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def init_args(self: Any, *args: Any) -> Any:
        args_hst, kwargs_hst = prepare(self, *args)
        bases = [getattr(argument, "base", argument) for argument in (*args_hst, *kwargs_hst.values())]
        launch.allow([t for t in bases if isinstance(t, Tensor)])
        return args_hst, kwargs_hst

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launch.load(_program(self), ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest, **named)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.store(_program(self), ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = (
        init_args,
        masked_load,
        masked_store,
    )
    try:
        yield
    finally:
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store = prepare, load, store
