"""The kernels through every door: operators, layer, torch.compile, and the refusals."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import evaluate
from counting import CountOps
from harness import DEVICE, TINY, draw, fused, interpreter_only, token_backend
from torch import nn

import neat_kernels as nk
from neat_kernels import plan
from neat_kernels.vocabulary import ORIENTATIONS

OPS = torch.ops.neat_kernels
ROOT = Path(__file__).parents[2]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


class TestOperators:
    @pytest.mark.parametrize(("orientation", "depth"), [("out", 0), ("in", 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_features_pass_opcheck(self, dtype, orientation, depth):
        A = randn(3, 7 if orientation == "out" else 9).requires_grad_()
        chain = randn(2 * depth, 3, 3).requires_grad_() if depth else None
        torch.library.opcheck(OPS.features.default, (randn(7, 9, dtype=dtype), A, chain, orientation, "silu", "triton"))

    @pytest.mark.parametrize(("need_dA", "need_dchain"), [(torch.bfloat16, True), (None, True), (torch.float32, False)])
    def test_features_backward_passes_opcheck(self, need_dA, need_dchain):
        arguments = (
            randn(9, 3),
            randn(7, 9),
            randn(9, 3),
            randn(4, 3, 3),
            "out",
            "gelu",
            need_dA,
            need_dchain,
            "triton",
        )
        torch.library.opcheck(OPS.features_backward.default, arguments)

    @pytest.mark.parametrize("plan", ["fused", "cublas"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_low_rank_linear_passes_opcheck(self, dropout, plan):
        seed = torch.tensor([99], device=DEVICE) if dropout else None
        tensors = [t.requires_grad_() for t in (randn(6, 9), randn(7), randn(9, 3), randn(7, 3))]
        x, bias, down, up = tensors
        torch.library.opcheck(
            OPS.low_rank_linear.default,
            (x, randn(7, 9), bias, down, up, seed, 0.5, dropout, None, token_backend(plan, x.dtype)),
        )

    @pytest.mark.parametrize("needs", [*itertools.combinations(range(4), 1), (0, 1, 2, 3)], ids=str)
    def test_low_rank_linear_backward_passes_opcheck(self, needs):
        dx, ddown, dup, dbias = (i in needs for i in range(4))
        torch.library.opcheck(
            OPS.low_rank_linear_backward.default,
            (
                randn(6, 7),
                randn(6, 9) if ddown else None,
                randn(7, 9) if dx else None,
                randn(9, 3) if dx else None,
                randn(7, 3) if dx or ddown else None,
                randn(6, 3) if dup else None,
                None,
                0.5,
                0.0,
                None,
                dx,
                torch.bfloat16 if ddown else None,
                torch.bfloat16 if dup else None,
                torch.float32 if dbias else None,
                token_backend("fused", torch.float32),
            ),
        )


def make(**options):
    layer = nk.FusedNeatLinear(12, 10, r=3, activation="gelu", backend="triton", device=DEVICE, **options)
    nn.init.normal_(layer.neat_B)
    layer.bias.requires_grad_(True)
    return layer


def step(call, layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


class TestLayer:
    @pytest.mark.parametrize("depth", [0, 1])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_one_graph_and_the_same_bits(self, orientation, depth):
        torch._dynamo.reset()
        layer, x = make(orientation=orientation, depth=depth), randn(2, 5, 12)
        expected = step(layer, layer, x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            for ours, theirs in zip(step(compiled, layer, x), expected, strict=True):
                assert torch.equal(ours, theirs)

    def test_every_gradient_is_the_torch_backends(self):
        layer, x = make(depth=1), randn(5, 12)
        ours = step(layer, layer, x)
        layer.backend = "torch"
        for a, b in zip(ours, step(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_fresh_layer_is_the_frozen_one(self):
        linear = nn.Linear(12, 10, device=DEVICE)
        layer = nk.FusedNeatLinear.from_linear(linear, r=3, backend="triton")
        x = randn(5, 12)
        torch.testing.assert_close(layer(x), linear(x))

    def test_cached_features_are_answered_by_the_kernels(self):
        layer, x = make().eval(), randn(5, 12)
        with torch.no_grad():
            layer(x)
            with CountOps() as ops:
                layer(x)
        assert ops.arguments["low_rank_linear"][0][-1].startswith("triton")

    def test_the_cache_of_eval_and_its_end(self, monkeypatch):
        layer, x = make().eval(), randn(5, 12)
        features, calls = nk.functional.neat_features, []

        def counted(*args, **options):
            calls.append(options["backend"])
            return features(*args, **options)

        monkeypatch.setattr(nk.functional, "neat_features", counted)
        with torch.no_grad():
            first = layer(x)
            assert torch.equal(layer(x), first)
            assert calls == ["triton"]
            layer.neat_A.mul_(2.0)
            assert not torch.equal(layer(x), first)
        assert calls == ["triton", "triton"]

    def test_the_state_moves_between_backends(self):
        layer, x = make(depth=1), randn(5, 12)
        other = nk.FusedNeatLinear(12, 10, r=3, depth=1, activation="gelu", backend="torch", device=DEVICE)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), layer(x))

    def test_merging(self):
        layer, x = make().eval(), randn(5, 12)
        with torch.no_grad():
            before = layer(x)
            layer.merge()
            torch.testing.assert_close(layer(x), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_explain(self, dtype):
        layer = make(dtype=dtype)
        told = layer.explain(randn(5, 12, dtype=dtype))
        assert (told.backend, told.base_gemm) == ("triton", "fused")
        assert told.reason.startswith("requested")

    def test_gpt2_conv1d(self):
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(10, 12).to(DEVICE)
        nn.init.normal_(conv1d.bias)
        layer = nk.FusedNeatLinear.from_linear(conv1d, r=3, backend="triton")
        x = randn(5, 12)
        torch.testing.assert_close(layer(x), conv1d(x))
        assert all(torch.isfinite(t).all() for t in step(layer, layer, x))


def test_lora_through_the_token_side():
    x, weight, lora_A, lora_B = randn(5, 12), randn(10, 12), randn(3, 12), randn(10, 3)
    y = nk.functional.low_rank_linear(x, weight, lora_A.t(), lora_B, scaling=0.5, backend="triton")
    torch.testing.assert_close(y, x @ weight.t() + 0.5 * (x @ lora_A.t()) @ lora_B.t())


def test_double_backward_is_refused():
    case = draw(*TINY)
    x = case.x.requires_grad_()
    y = nk.functional.neat_linear(x, case.weight, case.A, case.B, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


class TestWhatCannotRun:
    def test_float64(self):
        with pytest.raises(nk.BackendUnavailableError, match="take no float64"):
            fused(draw(*TINY, dtype=torch.float64))

    def test_float64_adapters(self):
        case = draw(*TINY, adapter_dtype=torch.float64)
        with pytest.raises(nk.BackendUnavailableError, match="take no float64"):
            fused(case)

    def test_a_rank_over_the_limit(self):
        with pytest.raises(nk.BackendUnavailableError, match="r up to 128, got 129"):
            fused(draw(5, 7, 6, 129))

    def test_a_layer_says_so_before_it_computes(self):
        layer = make(dtype=torch.float64)
        with pytest.raises(nk.BackendUnavailableError, match="float64"):
            layer.explain(randn(5, 12, dtype=torch.float64))

    @pytest.mark.parametrize(("dtype", "r"), [(torch.float64, 3), (torch.float32, 129)], ids=str)
    def test_auto_takes_torch_instead(self, dtype, r, monkeypatch):
        # As on a GPU that runs the kernels: on a CPU auto takes torch whatever the call.
        monkeypatch.setattr(plan, "_device_obstacle", lambda device: None)
        chosen = plan.choose_backend("auto", torch.device("cuda"), (torch.float32, dtype), r)
        assert chosen == "torch"
        assert plan.choose_backend("auto", torch.device("cuda"), (torch.float32,), 128) == "triton"
        case = draw(5, 7, 6, r, dtype=dtype)
        assert torch.isfinite(evaluate(nk.functional.neat_linear, case, backend="auto")["y"]).all()

    @interpreter_only
    def test_on_a_cpu_auto_takes_torch(self):
        layer = make()
        layer.backend = "auto"
        assert layer.explain(randn(5, 12)).backend == "torch"

    def test_a_cpu_without_the_interpreter(self):
        script = """
import torch, neat_kernels as nk
layer = nk.FusedNeatLinear(4, 3, r=2, backend="triton")
for call in (lambda: layer(torch.zeros(5, 4)), lambda: layer.explain(torch.zeros(5, 4))):
    try:
        call()
    except nk.BackendUnavailableError as error:
        assert "TRITON_INTERPRET=1" in str(error), error
    else:
        raise SystemExit("nothing was raised")
layer.backend = "auto"
assert layer(torch.zeros(5, 4)).shape == (5, 3)
"""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
