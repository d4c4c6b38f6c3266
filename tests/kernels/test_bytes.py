"""What each stage reads and writes, element by element, as the interpreter sees it."""

import numpy as np
import pytest
import torch
from harness import use_multiprocessors
from torch.utils._python_dispatch import TorchDispatchMode

from neat_kernels.kernels import features, launch, low_rank
from neat_kernels.kernels.apply import apply
from neat_kernels.kernels.branch import Product
from neat_kernels.kernels.dgrad import dgrad
from neat_kernels.kernels.down import down
from neat_kernels.kernels.down_backward import down_backward
from neat_kernels.kernels.features_backward import through_chain
from neat_kernels.kernels.merge import merge
from neat_kernels.kernels.reduce import Parts
from neat_kernels.kernels.up_backward import up_backward
from neat_kernels.torch_backend.low_rank import Branch, Needs
from neat_kernels.vocabulary import ORIENTATIONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter shows single accesses")

# Ragged against the interpreter's tiles of 32 and 64, several of each.
M, N, K, R = 75, 101, 203, 5


class Accesses:
    """Addresses of every element that interpreted kernels load and store."""

    def __init__(self):
        self.loaded, self.stored = [], []

    def counts(self, addresses, tensor):
        """How often each element of a contiguous tensor is among the addresses."""
        offsets = np.concatenate(addresses).astype(np.int64) - tensor.data_ptr()
        inside = offsets[(offsets >= 0) & (offsets < tensor.nbytes)]
        assert not (inside % tensor.element_size()).any()
        counts = np.bincount(inside // tensor.element_size(), minlength=tensor.numel())
        return torch.from_numpy(counts).view(tensor.shape)

    def reads(self, tensor):
        return self.counts(self.loaded, tensor)

    def writes(self, tensor):
        return self.counts(self.stored, tensor)


class KeepAlive(TorchDispatchMode):
    """Frees no tensor inside, so that an address means one tensor for the whole of a test."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors.append(result)
        return result


@pytest.fixture
def accesses(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    seen = Accesses()
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def create_masked_load(self, ptrs, mask, *rest, **named):
        seen.loaded.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs, value, mask, *rest):
        seen.stored.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(Builder, "create_masked_store", create_masked_store)
    with KeepAlive():
        yield seen


def tensors(dtype=torch.bfloat16):
    shapes = {"x": (M, K), "W": (N, K), "dy": (M, N), "bias": (N,)}
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    drawn |= {"D": torch.randn(K, R), "U": torch.randn(N, R)}
    return drawn, launch.on(torch.device("cpu"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_down_reads_x_once(accesses, dropout):
    t, interpreter = tensors()
    seed = torch.tensor([5]) if dropout else None
    with interpreter:
        S, _ = down(t["x"], t["D"], seed, dropout, torch.bfloat16)
    assert (accesses.reads(t["x"]) == 1).all()
    assert (accesses.writes(S) == 1).all()


def test_apply_writes_y_once_and_never_reads_it(accesses):
    t, interpreter = tensors()
    S = torch.randn(M, R).bfloat16()
    with interpreter:
        y = apply(t["x"], t["W"], t["bias"], S, t["U"], 0.5, None)
    assert (accesses.writes(y) == 1).all()
    assert not accesses.reads(y).any()
    # Once for each of the 4 tile columns and 3 tile rows of y, which share them in the L2 cache.
    assert (accesses.reads(t["x"]) == 4).all()
    assert (accesses.reads(t["W"]) == 3).all()


def test_descriptors_move_what_pointers_do(accesses):
    _, interpreter = tensors()
    x, W, S, U = (
        torch.randn(M, 200).bfloat16(),
        torch.randn(104, 200).bfloat16(),
        torch.randn(M, R),
        torch.randn(104, R),
    )
    with interpreter:
        y = apply(x, W, None, S.bfloat16(), U, 0.5, None)
    assert launch.has_descriptors(x.device)
    assert (accesses.writes(y) == 1).all()
    assert not accesses.reads(y).any()
    assert (accesses.reads(x) == 4).all()
    assert (accesses.reads(W) == 3).all()


def test_dgrad_writes_dx_once_and_never_reads_it(accesses):
    t, interpreter = tensors()
    dS = torch.randn(M, R).bfloat16()
    with interpreter:
        dx = dgrad(t["dy"], t["W"], dS, t["D"], None, 0.0, None)
    assert (accesses.writes(dx) == 1).all()
    assert not accesses.reads(dx).any()


def test_dS_and_dU_and_dbias_come_from_one_read_of_dy(accesses):
    t, interpreter = tensors()
    S = torch.randn(M, R).bfloat16()
    with interpreter:
        gradients = up_backward(t["dy"], t["U"], S, 0.5, torch.bfloat16, torch.float32, torch.float32)
    assert (accesses.reads(t["dy"]) == 1).all()
    for gradient in gradients[:3]:
        assert (accesses.writes(gradient) == 1).all()


@pytest.mark.parametrize("multiprocessors", [0, 1000])
def test_a_product_for_cublas_is_written_once_and_never_read(accesses, multiprocessors, monkeypatch):
    use_multiprocessors(monkeypatch, multiprocessors)
    t, interpreter = tensors()
    with interpreter:
        S, y = down(t["x"], t["D"], None, 0.0, torch.bfloat16, Product(t["U"], t["bias"], 0.5, torch.bfloat16))
        product = Product(t["D"], None, 1.0, torch.bfloat16)
        dS, _, _, dx = up_backward(t["dy"], t["U"], S, 0.5, torch.bfloat16, None, None, product)
    for written in (S, dS, y, dx):
        assert (accesses.writes(written) == 1).all()
    for large in (y, dx):
        assert not accesses.reads(large).any()
    assert (accesses.reads(t["dy"]) == 1).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_down_backward_reads_x_once(accesses, dropout):
    t, interpreter = tensors()
    seed = torch.tensor([5]) if dropout else None
    with interpreter:
        dD = down_backward(t["x"], torch.randn(M, R).bfloat16(), seed, dropout, torch.float32)
    assert (accesses.reads(t["x"]) == 1).all()
    assert (accesses.writes(dD) == 1).all()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_features_read_the_weight_once_each_way(accesses, orientation, depth):
    t, _ = tensors()
    A = torch.randn(R, N if orientation == "out" else K)
    chain = torch.randn(2 * depth, R, R) if depth else None
    H, Z = features.forward(t["W"], A, chain, orientation, "gelu")
    assert (accesses.reads(t["W"]) == 1).all()
    assert (accesses.writes(H) == 1).all()
    assert (accesses.writes(Z) == 1).all()
    dA, dchain = features.backward(torch.randn_like(H), t["W"], Z, chain, orientation, "gelu", torch.float32, True)
    assert (accesses.reads(t["W"]) == 2).all()
    assert (accesses.writes(dA) == 1).all()
    assert not depth or (accesses.writes(dchain) == 1).all()


def test_the_chain_reads_partial_sums_of_dH_once(accesses):
    _, interpreter = tensors()
    parts = Parts(torch.randn(3, K, R), 2.0)
    with interpreter:
        dZ, _ = through_chain(parts, torch.randn(K, R), torch.randn(2, R, R), "gelu", True)
    assert (accesses.reads(parts.partial) == 1).all()
    assert (accesses.writes(dZ) == 1).all()


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_reads_the_weight_once_and_writes_the_sum_once(accesses, transposed, seed):
    t, _ = tensors()
    stored = torch.randn(K, N).bfloat16() if transposed else t["W"]
    W = stored.t() if transposed else stored
    merged, finite = merge(W, t["D"], t["U"], 0.5, None if seed is None else torch.tensor([seed]))
    merged = merged.t() if transposed else merged
    assert finite
    assert merged.is_contiguous()
    assert (accesses.reads(stored) == 1).all()
    assert not accesses.writes(stored).any()
    assert (accesses.writes(merged) == 1).all()
    assert not accesses.reads(merged).any()


def test_what_nobody_asked_for_is_not_read(accesses):
    t, _ = tensors()
    branch = Branch(0.5, 0.0, None, "triton:fused:fused")
    needs = Needs(False, torch.float32, None, None)
    low_rank.backward(t["dy"], t["x"], t["W"], t["D"], t["U"], None, None, branch, needs)
    assert (accesses.reads(t["dy"]) == 1).all()
    assert (accesses.reads(t["x"]) == 1).all()
    assert not accesses.reads(t["W"]).any()


def test_the_count_sees_a_second_read(accesses):
    t, interpreter = tensors()
    with interpreter:
        for _ in range(2):
            down(t["x"], t["D"], None, 0.0, torch.bfloat16)
    assert (accesses.reads(t["x"]) == 2).all()
