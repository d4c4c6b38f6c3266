"""The peak of the bytes that tensors hold during one training step, on a CPU as on a GPU."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def peak_of_step(step: Callable[[], None], model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Run one training step and return the peak of the bytes held in tensors, weights and optimizer state included.

    Args:
        step: runs forward, backward and the optimizer, and leaves no gradients behind.
        model: what is trained; holds no gradients before the step.
        optimizer: its optimizer, whose state exists already.

    Returns:
        Bytes, or None on a device whose allocator reports no peak.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        return held_bytes(model, optimizer) + traced_peak(step)
    if device.type not in ("cuda", "xpu"):
        step()
        return None
    backend: Any = getattr(torch, device.type)
    backend.reset_peak_memory_stats(device)
    step()
    return int(backend.max_memory_allocated(device))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state, memory that is shared counted once."""
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return storage_bytes([*model.parameters(), *model.buffers(), *state])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def traced_peak(step: Callable[[], object]) -> int:
    """The most bytes that `step` held at one time beyond what was there before, as the CPU allocator reports them."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silenced_stderr():
        profiler.start()
    step()
    with silenced_stderr():
        profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return peak_of_events([event for event in events if event.get("name") == "[memory]"])


def peak_of_events(events: Iterable[dict[str, Any]]) -> int:
    """The peak of the running sum of allocated minus freed bytes."""
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: no setting keeps the profiler from logging its start and stop there."""
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
