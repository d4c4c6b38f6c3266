"""The activations and the dropout mask as device functions: against float64, and bit for bit.

A kernel's error may be twice that of eager torch in fp32 nearby, plus a few units in the last place.
"""

import pytest
import torch
import triton
import triton.language as tl
from harness import DEVICE

from neat_kernels.kernels import launch
from neat_kernels.kernels.activations import act_backward, act_forward
from neat_kernels.kernels.dropout import kept
from neat_kernels.torch_backend.activations import activation
from neat_kernels.torch_backend.dropout import keep_mask, philox, threshold
from neat_kernels.vocabulary import ACTIVATIONS

# The interpreter is numpy, which says where an exponential overflows and where infinity meets infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

ULP = 2.0**-23
NEARBY = 512
STEEPEST = {"sin2pi": 2 * torch.pi}
REACH = {"sin": 1e4, "sin2pi": 1e4}


@triton.jit
def _activation_kernel(z_ptr, dh_ptr, h_ptr, dz_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    dh = tl.load(dh_ptr + offs, mask=offs < n, other=0.0)
    tl.store(h_ptr + offs, act_forward(z, ACTIVATION), mask=offs < n)
    tl.store(dz_ptr + offs, act_backward(dh, z, ACTIVATION), mask=offs < n)


def run(name, z, dh=None):
    h, dz = torch.empty_like(z), torch.empty_like(z)
    dh = torch.ones_like(z) if dh is None else dh
    block = 1 << 14 if DEVICE.type == "cpu" else 1024
    with launch.on(DEVICE):
        _activation_kernel[(triton.cdiv(len(z), block),)](z, dh, h, dz, len(z), ACTIVATION=name, BLOCK=block)
    return h, dz


def eager(name, z):
    return activation(name).forward(z.clone()), activation(name).backward(torch.ones_like(z), z)


def exact(name, z):
    """h and dh/dz in float64 by autograd."""
    z = z.double().requires_grad_()
    # A shift by whole turns is exact in float64 and changes no sine.
    h = torch.sin(2 * torch.pi * (z - z.detach().round())) if name == "sin2pi" else activation(name).forward(z)
    return h.detach(), torch.autograd.grad(h.sum(), z)[0]


def grid(name):
    """Increasing arguments: zero, every magnitude from 1e-37 on, and evenly spaced ones."""
    reach = REACH.get(name, 100.0)
    tiny = torch.logspace(-37, 2, 20001, dtype=torch.float64)
    parts = [torch.zeros(1), tiny, -tiny, torch.linspace(-8, 8, 40001), torch.linspace(-reach, reach, 40001)]
    return torch.cat([p.float() for p in parts]).unique().to(DEVICE)


def largest_nearby(t):
    return torch.nn.functional.max_pool1d(t[None], 2 * NEARBY + 1, stride=1, padding=NEARBY)[0]


def assert_accurate(ours, theirs, want, scale):
    error, eager_error = (ours.double() - want).abs(), (theirs.double() - want).abs()
    excess = error - 2 * largest_nearby(eager_error) - 4 * ULP * scale
    assert (excess <= 0).all(), f"{(excess / (ULP * scale)).max():.1f} ulp too much, at index {excess.argmax()}"


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestActivations:
    def test_forward(self, name):
        z = grid(name)
        want, slope = exact(name, z)
        # The value, or where it vanishes what one rounding of z would change: sin(z) is not small near π by itself.
        scale = torch.maximum(want.abs(), (z * slope).abs().clamp(max=1.0))
        if name == "gelu_tanh":
            # Where 1 + tanh cancels, in eager torch too, nothing finer than z's own units is left.
            scale = torch.maximum(scale, z.abs().clamp(max=1.0))
        assert_accurate(run(name, z)[0], eager(name, z)[0], want, scale)

    def test_derivative(self, name):
        z = grid(name)
        _, want = exact(name, z)
        scale = want.abs().clamp(min=STEEPEST.get(name, 1.0))
        assert_accurate(run(name, z)[1], eager(name, z)[1], want, scale)

    def test_zero_is_exact(self, name):
        z = torch.zeros(16, device=DEVICE)
        assert torch.equal(run(name, z)[0], eager(name, z)[0])

    def test_the_derivative_is_multiplied_by_dh(self, name):
        z, dh = torch.randn(2, 1000, device=DEVICE)
        torch.testing.assert_close(run(name, z, dh)[1], dh * run(name, z)[1], rtol=4 * ULP, atol=0.0)

    def test_what_is_not_finite(self, name):
        z = torch.tensor([float("inf"), -float("inf"), float("nan")], device=DEVICE)
        h, dz = run(name, z)
        # In float64: torch's vectorised fp32 gelu of infinity is NaN on some CPUs.
        expected_h, expected_dz = (t.float() for t in eager(name, z.double()))
        assert torch.equal(h.nan_to_num(nan=7.0), expected_h.nan_to_num(nan=7.0))
        assert torch.equal(dz[2:].nan_to_num(nan=7.0), expected_dz[2:].nan_to_num(nan=7.0))

    def test_saturation(self, name):
        # e⁻ᶻ overflows fp32 from z = -89 on.
        z = torch.tensor([-1e4, -200.0, -89.0, 89.0, 200.0, 1e4], device=DEVICE)
        for ours, expected in zip(run(name, z), exact(name, z), strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top", [1e5, 1e6, 1e8, 1e12, 3e38])
@pytest.mark.parametrize("name", ["sin", "sin2pi"])
def test_a_sine_of_any_finite_number_is_bounded(name, top):
    z = torch.linspace(-top, top, 4001, dtype=torch.float64, device=DEVICE).float()
    for value, bound in zip(run(name, z), (1.0, STEEPEST.get(name, 1.0)), strict=True):
        assert (value.abs() <= bound * (1 + 4 * ULP)).all()


@triton.jit
def _kept_kernel(tile_ptr, index_ptr, seed_ptr, out_ptr, n, threshold, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(tile_ptr + offs, mask=offs < n, other=0.0)
    index = tl.load(index_ptr + offs, mask=offs < n, other=0)
    tl.store(out_ptr + offs, kept(tile, seed_ptr, index, threshold), mask=offs < n)


def drop(tile, index, seed, dropout):
    out = torch.empty_like(tile)
    grid = (triton.cdiv(len(tile), 1024),)
    with launch.on(DEVICE):
        _kept_kernel[grid](tile, index, seed, out, len(tile), threshold(dropout), BLOCK=1024)
    return out


class TestDropoutMask:
    @pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF])
    @pytest.mark.parametrize("dropout", [1e-9, 0.1, 0.5, 0.999])
    def test_the_bits_of_the_torch_backend_for_any_index(self, dropout, seed):
        starts = torch.tensor([0, 2**16, 2**31, 2**32 - 40, 2**32 + 2**31, 2**40 + 7, 2**62], device=DEVICE)
        index = (starts[:, None] + torch.arange(-40, 200, device=DEVICE)).clamp(min=0).reshape(-1)
        seed = torch.tensor([seed], device=DEVICE)
        ones = torch.ones(len(index), device=DEVICE)
        kept_here = drop(ones, index, seed, dropout) == 1.0
        assert torch.equal(kept_here, philox(seed, index) >= threshold(dropout))

    def test_a_row_beyond_2_to_the_32(self):
        columns, seed = 311, torch.tensor([5], device=DEVICE)
        row = 2**32 // columns + 3
        mask = keep_mask(seed, slice(row, row + 4), columns, 0.3)
        index = torch.arange(row * columns, (row + 4) * columns, device=DEVICE)
        ones = torch.ones(len(index), device=DEVICE)
        assert torch.equal(drop(ones, index, seed, 0.3).view(4, columns) == 1.0, mask)

    def test_a_word_equal_to_the_threshold_is_kept(self):
        seed, index = torch.tensor([5], device=DEVICE), torch.arange(16, device=DEVICE)
        word = philox(seed, index)[3].item()
        assert threshold(word / 2**32) == word
        assert drop(torch.ones(16, device=DEVICE), index, seed, word / 2**32)[3] == 1.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_what_is_kept_is_kept_exactly(self, dtype):
        tile = torch.randn(5000, device=DEVICE).to(dtype)
        index, seed = torch.arange(5000, device=DEVICE), torch.tensor([9], device=DEVICE)
        mask = keep_mask(seed, slice(0, 1), 5000, 0.4)[0]
        assert torch.equal(drop(tile, index, seed, 0.4), tile.where(mask, 0.0))
