"""A hash of a frozen weight, by which a file tells the base that it belongs to."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor

from neat_kernels.adapters.errors import AdapterError
from neat_kernels.vocabulary import is_sharded, wide_dtype

_BLOCK_BYTES = 1 << 26


def fingerprint(*tensors: Tensor | None) -> str:
    """SHA-256 of shapes and values, read in row blocks of 64 MiB.

    Half values are hashed as float32, which holds them exactly: a bfloat16 checkpoint that is loaded in float32 is the
    same base.

    Args:
        tensors: W in the layout of its layer, then the frozen bias; None is left out.

    Returns:
        64 hexadecimal digits; equal for equal values, whatever the device and the strides.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = wide_dtype(tensor)
        digest.update(f"{dtype} {tuple(tensor.shape)};".encode())
        rows = tensor.detach()
        step = max(1, _BLOCK_BYTES // max(1, rows[:1].numel() * dtype.itemsize))
        for block in rows.split(step):
            digest.update(memoryview(block.to(dtype).cpu().contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def gathered(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or what the processes that share it hold of it, which must all call this; else AdapterError."""
    whole = cast(Any, tensor.detach()).full_tensor() if is_sharded(tensor) else tensor
    return check_plain(name, whole)


def check_plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds its values here and whole; else AdapterError."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.device.type == "meta":
        kind = "one on the meta device" if plain else f"a {type(tensor).__name__}"
        raise AdapterError(f"{name}: expected a tensor that holds its values in this process, got {kind}; gather it")
    return tensor
