"""What the layer keeps for backward, and that neither direction ever allocates anything of W's size."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

TOKENS, IN, OUT, R = 24, 768, 1024, 4


def peak_allocation(step):
    """Bytes of the largest single allocation that the CPU allocator reported while `step` ran."""
    return allocations(step)[0]


def allocations(step):
    """Bytes of every allocation that the CPU allocator reported while `step` ran, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    sizes = [event.nbytes() for event in _memory_events(profile) if event.nbytes() > 0]
    assert sizes, "the profiler saw no allocation: the test would prove nothing"
    return sorted(sizes, reverse=True)


def _memory_events(profile):
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


def make(depth, weight_dtype, adapter_dtype, orientation):
    linear = torch.nn.Linear(IN, OUT, dtype=weight_dtype)
    layer = nk.FusedNeatLinear.from_linear(
        linear, r=R, depth=depth, orientation=orientation, activation="gelu", dtype=adapter_dtype
    )
    torch.nn.init.normal_(layer.neat_B)
    return layer


MODES = {
    "fp32": (torch.float32, None, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp32 adapter, bf16 weight": (torch.bfloat16, torch.float32, False),
    "autocast": (torch.float32, None, True),
}


@pytest.mark.parametrize("x_needs_grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_nothing_of_the_size_of_the_weight(base_gemm, orientation, depth, mode, x_needs_grad):
    weight_dtype, adapter_dtype, autocast = MODES[mode]
    layer = make(depth, weight_dtype, adapter_dtype, orientation)
    x = torch.randn(TOKENS, IN, dtype=weight_dtype, requires_grad=x_needs_grad)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(torch.ones_like(y))

    limit = OUT * IN * 2
    if autocast and base_gemm == "native":
        # One transient copy of W in the autocast dtype, as F.linear makes one.
        limit += 1
    assert peak_allocation(step) < limit


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("conv", [False, True])
def test_a_merge_allocates_nothing_larger_than_its_result(conv, rounding):
    # In bf16, where the result is the smallest: 8 MiB, and blocks of 1 MiB in int64 or less.
    base = Conv1D(2048, 2048) if conv else torch.nn.Linear(2048, 2048)
    layer = nk.FusedNeatLinear.from_linear(base.to(torch.bfloat16), r=R)
    torch.nn.init.normal_(layer.neat_B)
    weight = 2048 * 2048 * 2
    sizes = allocations(lambda: layer.merged_weight(rounding=rounding))
    assert sizes[0] == weight
    assert sizes[1] <= 2**20


def test_the_probe_sees_a_delta_weight():
    linear, delta = torch.nn.Linear(IN, OUT), torch.randn(OUT, IN)
    assert peak_allocation(lambda: linear.weight + delta) >= OUT * IN * 4


class SavedBytes:
    """Distinct storages that autograd saves, keyed by address, parameters left out."""

    def __init__(self, parameters):
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.saved = {}

    def pack(self, t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.saved[storage.data_ptr()] = storage.nbytes()
        return t

    def total(self):
        return sum(self.saved.values())


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_bytes_saved_for_backward(orientation, depth, mode):
    weight_dtype, adapter_dtype, autocast = MODES[mode]
    layer = make(depth, weight_dtype, adapter_dtype, orientation)
    x = torch.randn(TOKENS, IN, dtype=weight_dtype, requires_grad=True)
    counter = SavedBytes([*layer.parameters(), x])
    with (
        torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x)
    branch = 2 if weight_dtype == torch.bfloat16 or autocast else 4
    rows = IN if orientation == "out" else OUT
    S, H, Z, chain = TOKENS * R * branch, rows * R * 4, rows * R * 4, 2 * depth * R * R * 4
    cast_x = TOKENS * IN * 2 if autocast else 0
    assert counter.total() <= S + H + Z + 2 * chain + cast_x
    y.backward(torch.ones_like(y))
    assert layer.neat_A.grad is not None
