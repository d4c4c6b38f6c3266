"""What one contender allocates and what it saves for backward, on a CPU as on a GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from neat_kernels.bench.contenders import Layer
from neat_kernels.bench.measure import Mode, call_of, clear_gradients
from neat_kernels.bench.problem import Problem
from neat_kernels.finetune.memory import storage_bytes, traced_peak


def peak_bytes(layer: Layer, problem: Problem, mode: Mode = "training") -> int:
    """The most that one call of a warm layer has allocated at a time, y and gradients included.

    Args:
        layer: has run before in this mode.
        problem: on a CPU or a CUDA device.
        mode: what is called; of backward, the forward that it needs is called too.

    Returns:
        Bytes beyond what was there before.
    """
    call = call_of(mode)
    clear_gradients(layer, problem)
    if problem.x.device.type == "cpu":
        return traced_peak(functools.partial(call, layer, problem))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(layer, problem)
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(layer: Layer, problem: Problem) -> int:
    """Bytes that the forward keeps for backward, each storage once: x if it is kept, but no parameter.

    Parameters and the frozen weight are there anyway.
    """
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    clear_gradients(layer, problem)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer.forward(problem.x)
    there = {tensor.untyped_storage().data_ptr() for tensor in layer.held}
    kept = storage_bytes(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in there)
    del y
    return kept
