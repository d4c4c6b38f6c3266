"""Dtypes of outputs and gradients, autocast, compute_dtype, fp32 adapters over half weights, dtype and device moves.

Where a value is compared, inputs are small integers and powers of two, so that every product and sum is exact in fp32
and each rounding of the contract shows as an exact bit pattern: no tolerance is needed.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

HALVES = [torch.bfloat16, torch.float16]
SIZES = (24, 20)
# Bounds of x, exact in its dtype, that make S too long for that dtype.
LARGE = {torch.bfloat16: 64, torch.float16: 512}
# Keeps fp16 below its maximum where S is large enough to be rounded.
SMALL = 2.0**-6


def integers(*shape, low=-4, high=4):
    return torch.randint(low, high + 1, shape).float()


def exact_layer(weight_dtype, adapter_dtype=None, orientation="out", depth=0, **options):
    """A layer whose parameters are small integers, exact in every dtype."""
    layer = nk.FusedNeatLinear.from_linear(
        nn.Linear(*SIZES, dtype=weight_dtype),
        r=3,
        orientation=orientation,
        depth=depth,
        dtype=adapter_dtype or weight_dtype,
        **options,
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(integers(*p.shape, low=-2, high=2))
    return layer


def rounded(t, dtype):
    return t.to(dtype).double()


def by_the_contract(layer, x, c, out_dtype):
    """y in float64, rounded where the contract rounds: W and x to the input dtype, D, U and S to c, y once."""
    W, A, B = (p.detach().double() for p in (layer.weight, layer.neat_A, layer.neat_B))
    H = nk.reference.neat_features(W, A, orientation=layer.orientation, activation=layer.activation)
    D, U = (H, B) if layer.orientation == "out" else (B, H)
    x, W = rounded(x, out_dtype), rounded(W, out_dtype)
    S = rounded(x @ rounded(D, c), c)
    return (x @ W.t() + layer.bias.detach().double() + layer.scaling * S @ rounded(U, c).t()).to(out_dtype)


def telling_contract(layer, x, c, out_dtype):
    """`by_the_contract`, for a draw in which a half branch and an fp32 branch round to different outputs."""
    half, wide = (by_the_contract(layer, x, branch, out_dtype) for branch in (out_dtype, torch.float32))
    assert not torch.equal(half, wide), "the draw would prove nothing"
    return wide if c == torch.float32 else half


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("depth", [0, 1])
    def test_output_and_gradients_have_their_own_dtypes(self, depth, orientation, dtype, base_gemm):
        for adapter_dtype in (torch.float64, torch.float32, torch.bfloat16):
            layer = exact_layer(dtype, adapter_dtype, orientation, depth)
            layer.bias.requires_grad_(True)
            x = integers(5, SIZES[0]).to(dtype).requires_grad_()
            y = layer(x)
            assert y.dtype == dtype
            y.sum().backward()
            for p in (x, *(p for p in layer.parameters() if p.requires_grad)):
                assert p.grad.dtype == p.dtype
                assert torch.isfinite(p.grad).all()

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_the_sum_is_rounded_as_the_contract_says(self, dtype, compute_dtype, orientation, monkeypatch):
        monkeypatch.setattr("neat_kernels.torch_backend.low_rank.casts_blocks", lambda device, d: d in HALVES)
        layer = exact_layer(dtype, torch.float32, orientation, compute_dtype=compute_dtype, scaling=SMALL)
        x = integers(50, SIZES[0], low=-LARGE[dtype], high=LARGE[dtype]).to(dtype)
        assert torch.equal(layer(x), telling_contract(layer, x, compute_dtype or dtype, dtype))

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_fp32_branch_differs_from_the_half_branch(self, orientation, base_gemm):
        x = integers(50, SIZES[0], low=-64, high=64).bfloat16()
        layer = exact_layer(torch.bfloat16, torch.float32, orientation, scaling=SMALL)
        plain = layer(x)
        layer.compute_dtype = torch.float32
        assert not torch.equal(layer(x), plain)

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_features_come_from_unrounded_fp32_parameters(self, dtype, orientation, base_gemm):
        # 1 + 2⁻¹⁶ is 1 in every half dtype: a layer that rounds A first would lose the difference.
        layer = exact_layer(dtype, torch.float32, orientation, activation="identity", compute_dtype=torch.float32)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            layer.bias.zero_()
            layer.neat_A.fill_(1 + 2.0**-16)
            layer.neat_B.fill_(1.0)
        delta = layer.delta_weight()
        assert torch.equal(delta.unique(), torch.tensor([0.0, 3 * (1 + 2.0**-16)]).unique()[-delta.unique().numel() :])


class TestAutocast:
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes(self, weight_dtype, x_dtype, orientation, dtype, base_gemm):
        layer = exact_layer(weight_dtype, torch.float32, orientation, depth=1)
        x = integers(5, SIZES[0]).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert x.grad.dtype == x_dtype
        assert layer.neat_A.grad.dtype == layer.neat_B.grad.dtype == torch.float32

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
    def test_values(self, compute_dtype, orientation, dtype, monkeypatch):
        monkeypatch.setattr("neat_kernels.torch_backend.low_rank.casts_blocks", lambda device, d: d in HALVES)
        layer = exact_layer(torch.float32, None, orientation, compute_dtype=compute_dtype, scaling=SMALL)
        x = integers(50, SIZES[0], low=-LARGE[dtype], high=LARGE[dtype])
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert torch.equal(y, telling_contract(layer, x, compute_dtype or dtype, dtype))

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_a_weight_that_does_not_fit_the_autocast_dtype_is_rounded_like_torchs(self, orientation, base_gemm):
        layer = exact_layer(torch.float32, None, orientation)
        with torch.no_grad():
            layer.weight.add_(2.0**-12)
            layer.bias.zero_()
            layer.neat_B.zero_()
        x = torch.eye(SIZES[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), F.linear(x, layer.weight))

    def test_the_features_are_computed_outside_autocast(self):
        layer = exact_layer(torch.float32)
        with torch.no_grad():
            layer.neat_A.add_(2.0**-16)
        plain = nk.functional.neat_features(layer.weight, layer.neat_A)
        with torch.autocast("cpu", torch.bfloat16):
            inside = nk.functional.neat_features(layer.weight, layer.neat_A)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, plain)

    def test_float64_is_exempt(self):
        layer = exact_layer(torch.float64)
        x = integers(5, SIZES[0]).double()
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))

    def test_backward_inside_and_outside_the_block_agree(self, base_gemm):
        layer, gradients = exact_layer(torch.float32, depth=1), []
        x = integers(5, SIZES[0])
        for inside in (False, True):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = layer(x).float().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            gradients.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.equal(gradients[0][k], gradients[1][k]) for k in gradients[0])

    def test_a_disabled_block_inside(self):
        layer, x = exact_layer(torch.float32), integers(5, SIZES[0])
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            y = layer(x)
        assert y.dtype == torch.float32
        assert torch.equal(y, layer(x))

    def test_a_merged_layer_under_autocast(self):
        layer, x = exact_layer(torch.float32).eval(), integers(5, SIZES[0])
        layer.merge()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


class TestComputeDtype:
    @pytest.mark.parametrize(
        ("dtype", "compute_dtype"),
        [
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float64),
            (torch.float64, torch.float32),
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.float64),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("cached", [False, True])
    def test_what_cannot_be_met_is_refused(self, dtype, compute_dtype, cached):
        layer = exact_layer(dtype, compute_dtype=compute_dtype).train(not cached)
        with torch.set_grad_enabled(not cached), pytest.raises(ValueError, match=f"compute_dtype.*got {compute_dtype}"):
            layer(torch.zeros(5, SIZES[0], dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_naming_the_inputs_own_dtype_changes_nothing(self, dtype, base_gemm):
        layer, x = exact_layer(dtype), integers(5, SIZES[0]).to(dtype)
        expected = layer(x)
        layer.compute_dtype = dtype
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_the_fp32_branch_keeps_what_the_half_branch_rounds_away(self, orientation, dtype, base_gemm):
        # S = 1 + 2⁻¹⁴ and a frozen part of -1: only an fp32 branch that is added before rounding leaves 2⁻¹⁴.
        linear = nn.Linear(2, 1, dtype=dtype)
        layer = nk.FusedNeatLinear.from_linear(
            linear, r=1, orientation=orientation, activation="identity", compute_dtype=torch.float32
        )
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
            layer.bias.fill_(-3.0 if orientation == "out" else -2.0)
            if orientation == "out":  # ΔW = W·A·B
                layer.neat_A.fill_(1.0)
                layer.neat_B.fill_(1 + 2.0**-14)
                x, expected = torch.tensor([[2.0, 0.0]]), 2 * (1 + 2.0**-14) + 2 - 3
            else:  # ΔW = (W·Aᵀ)·Bᵀ with W·Aᵀ = 1
                layer.neat_A.copy_(torch.tensor([[1.0, 0.0]]))
                layer.neat_B.copy_(torch.tensor([[1 + 2.0**-14], [0.0]]))
                x, expected = torch.tensor([[1.0, 0.0]]), 1 + (1 + 2.0**-14) - 2
        assert layer(x.to(dtype)).item() == torch.tensor(expected).to(dtype).item()


class TestMoves:
    @pytest.mark.parametrize("source", ["constructor", "linear"])
    @pytest.mark.parametrize("move", ["double", "bfloat16", "half", "to"])
    def test_dtype_moves_reach_every_parameter(self, move, source):
        layer = nk.FusedNeatLinear(*SIZES, r=3, depth=1)
        linear = nn.Linear(*SIZES)
        if source == "linear":
            layer = nk.FusedNeatLinear.from_linear(linear, r=3, depth=1)
        nn.init.normal_(layer.neat_B)
        dtype = {"double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16, "to": torch.float64}[move]
        moved = layer.to(dtype) if move == "to" else getattr(layer, move)()
        assert moved is layer
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert not layer.weight.requires_grad
        assert layer.neat_A.requires_grad
        if source == "linear":
            assert linear.weight is layer.weight
        x = torch.randn(5, SIZES[0], dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert layer.neat_A.grad.dtype == dtype

    def test_there_and_back_in_a_wider_dtype_is_exact(self):
        layer = exact_layer(torch.float32)
        x = torch.randn(5, SIZES[0])
        expected = layer(x)
        assert torch.equal(layer.double().float()(x), expected)

    @pytest.mark.parametrize(
        "flag", ["set_swap_module_params_on_conversion", "set_overwrite_module_params_on_conversion"]
    )
    @pytest.mark.parametrize("merged", [False, True])
    def test_torchs_other_ways_of_moving(self, flag, merged, request):
        layer = exact_layer(torch.float32)
        x = torch.randn(5, SIZES[0]).double()
        if merged:
            layer.merge()
        layer.eval()
        with torch.no_grad():
            layer(x.float())
        getattr(torch.__future__, flag)(True)
        request.addfinalizer(lambda: getattr(torch.__future__, flag)(False))
        layer.double()
        assert {p.dtype for p in (*layer.parameters(), layer.base_weight)} == {torch.float64}
        if merged:
            layer.unmerge()
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))

    def test_loading_with_swapped_parameters(self, request):
        layer, source = exact_layer(torch.float32), exact_layer(torch.float32)
        torch.__future__.set_swap_module_params_on_conversion(True)
        request.addfinalizer(lambda: torch.__future__.set_swap_module_params_on_conversion(False))
        layer.load_state_dict(source.state_dict())
        x = torch.randn(5, SIZES[0])
        assert torch.equal(layer(x), source(x))

    @pytest.mark.parametrize("merged", [False, True])
    def test_a_merged_layer_moves_with_its_original_weight(self, merged):
        layer = exact_layer(torch.float32)
        before = layer.weight.detach().clone()
        if merged:
            layer.merge()
        layer.double()
        assert layer.base_weight.dtype == torch.float64
        if merged:
            layer.unmerge()
        assert torch.equal(layer.weight, before.double())

    def test_to_meta_and_to_empty(self):
        layer = exact_layer(torch.float32).to("meta")
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        layer.to_empty(device="cpu")
        layer.load_state_dict(exact_layer(torch.float32).state_dict())
        assert layer(torch.zeros(5, SIZES[0])).device.type == "cpu"

    def test_grad_scaler_in_fp16(self):
        layer = exact_layer(torch.float32)
        x = integers(5, SIZES[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).float().mean()
        loss.backward()
        plain = layer.neat_A.grad.clone()
        layer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).float().mean()
        scaler.scale(loss).backward()
        # A power of two scales every product without rounding, away from fp16's subnormals.
        assert torch.isfinite(layer.neat_A.grad).all()
        torch.testing.assert_close(layer.neat_A.grad / 1024, plain, rtol=2.0**-10, atol=2.0**-10 * plain.abs().max())
