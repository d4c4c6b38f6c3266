"""FusedNeatLinear as a module: construction, exact no-op, shapes, gradients, copies, checkpoints, refusals."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from counting import CountOps
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import neat_kernels as nk
from neat_kernels.vocabulary import ACTIVATIONS, ORIENTATIONS

DOUBLE = torch.float64


def make(in_features=12, out_features=10, *, cls=nk.FusedNeatLinear, **options):
    """A layer with a non-zero B, so that the adapter does something."""
    options = {"r": 3, "dtype": DOUBLE, **options}
    layer = cls(in_features, out_features, **options)
    nn.init.normal_(layer.neat_B)
    return layer


def make_conv1d(out_features, in_features, dtype=DOUBLE):
    conv = Conv1D(out_features, in_features).to(dtype)
    nn.init.normal_(conv.bias)
    return conv


def reference(layer, x):
    """The layer from the reference, twice differentiable; every parameter enters as it is."""
    weight = layer.weight.t() if layer.transposed else layer.weight
    return nk.reference.neat_linear(
        x,
        weight,
        layer.neat_A,
        layer.neat_B,
        layer.bias,
        encoders=tuple(layer.neat_encoders),
        decoders=tuple(layer.neat_decoders),
        orientation=layer.orientation,
        activation=layer.activation,
        scaling=layer.scaling,
    )


def adapter(layer):
    return [p for name, p in layer.named_parameters() if name.startswith("neat_")]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestConstruction:
    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize("bias", [False, True])
    def test_names_shapes_and_flags(self, bias, depth):
        layer = nk.FusedNeatLinear(12, 10, bias, r=3, depth=depth)
        names = ["weight", "neat_A", "neat_B"] + ["bias"] * bias
        names += [f"neat_{kind}.{i}" for kind in ("encoders", "decoders") for i in range(depth)]
        assert sorted(layer.state_dict()) == sorted(names)
        assert sorted(dict(layer.named_parameters())) == sorted(names)
        assert {n for n, p in layer.named_parameters() if not p.requires_grad} == {"weight", "bias"} & set(names)
        assert not list(layer.named_buffers())
        assert torch.equal(layer.neat_B, torch.zeros(10, 3))
        assert all(p.abs().sum() > 0 for name, p in layer.named_parameters() if name != "neat_B")

    @pytest.mark.parametrize(("orientation", "columns"), [("out", 10), ("in", 12)])
    def test_the_orientation_decides_the_shapes(self, orientation, columns):
        layer = nk.FusedNeatLinear(12, 10, r=3, orientation=orientation)
        assert tuple(layer.neat_A.shape) == (3, columns)
        assert tuple(layer.neat_B.shape) == (columns, 3)

    @pytest.mark.parametrize("make_linear", [lambda: nn.Linear(12, 10), lambda: make_conv1d(10, 12, torch.float32)])
    def test_from_linear_shares_the_parameters_and_freezes_them(self, make_linear):
        linear = make_linear()
        weight, bias = linear.weight, linear.bias
        layer = nk.FusedNeatLinear.from_linear(linear, r=3)
        assert layer.weight is weight is linear.weight
        assert layer.bias is bias is linear.bias
        assert not weight.requires_grad
        assert not bias.requires_grad
        assert (layer.in_features, layer.out_features) == (12, 10)
        assert len({p.data_ptr() for p in layer.parameters()}) == len(list(layer.parameters()))
        assert sum(p.numel() for p in layer.parameters()) == 12 * 10 + 10 + 3 * 10 * 2

    def test_constructor_and_from_linear_agree(self):
        layer = make(depth=1, activation="sin2pi", scaling=0.7, orientation="in")
        linear = nn.Linear(12, 10, dtype=DOUBLE)
        options = {"r": 3, "depth": 1, "activation": "sin2pi", "scaling": 0.7, "orientation": "in"}
        other = nk.FusedNeatLinear.from_linear(linear, **options)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(5, 12, dtype=DOUBLE)
        assert torch.equal(layer(x), other(x))
        assert repr(layer) == repr(other)

    @pytest.mark.parametrize("training", [False, True])
    def test_from_linear_takes_over_the_training_mode(self, training):
        assert nk.FusedNeatLinear.from_linear(nn.Linear(3, 4).train(training)).training is training

    @pytest.mark.parametrize(
        ("weight", "asked", "expected"),
        [
            (torch.float32, None, torch.float32),
            (torch.float64, None, torch.float64),
            (torch.bfloat16, None, torch.float32),
            (torch.float16, None, torch.float32),
            (torch.bfloat16, torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float64, torch.float64),
        ],
        ids=str,
    )
    def test_adapter_dtype_of_from_linear(self, weight, asked, expected):
        layer = nk.FusedNeatLinear.from_linear(nn.Linear(4, 5, dtype=weight), r=2, depth=1, dtype=asked)
        assert {p.dtype for p in adapter(layer)} == {expected}
        assert layer.weight.dtype == weight

    def test_constructor_dtype_holds_for_every_parameter(self):
        layer = nk.FusedNeatLinear(4, 5, r=2, depth=1, dtype=torch.bfloat16)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}

    def test_repr_names_sizes_and_options(self):
        text = repr(make(12, 10, depth=2, dropout=0.25, scaling=0.5, bias=False))
        for part in ("in_features=12", "out_features=10", "bias=False", "r=3", "'out'", "depth=2", "0.25", "0.5"):
            assert part in text

    def test_explain_says_backend_and_reason(self):
        layer = make(dtype=torch.float32)
        plan = layer.explain(torch.randn(2, 12))
        assert plan.backend == "torch"
        assert plan.reason
        assert plan.reason in str(plan)
        layer.merge()
        assert "merged" in str(layer.explain(torch.randn(2, 12)))

    def test_reset_adapter_is_a_no_op_again(self):
        layer = make(depth=1).eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        frozen = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            assert not torch.equal(layer(x), frozen)
            layer.reset_adapter()
            assert torch.equal(layer(x), frozen)


class TestExactNoOp:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("sizes", [(129, 257), (1, 1), (300, 1), (1, 300), (768, 96)], ids=str)
    def test_bit_for_bit(self, sizes, bias, dtype):
        linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
        for orientation in ORIENTATIONS:
            layer = nk.FusedNeatLinear.from_linear(linear, r=5, orientation=orientation, depth=1, activation="sigmoid")
            for tokens in (1, 2, 7, 65, 600):
                x = torch.randn(tokens, sizes[0], dtype=dtype)
                assert torch.equal(layer(x), linear(x))

    @pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_bit_for_bit_in_half_on_torchs_own_gemm(self, dtype, compute_dtype, monkeypatch):
        monkeypatch.setattr("neat_kernels.torch_backend.low_rank.casts_blocks", lambda device, dtype: False)
        for bias in (False, True):
            linear = nn.Linear(129, 257, bias=bias, dtype=dtype)
            layer = nk.FusedNeatLinear.from_linear(linear, r=5, compute_dtype=compute_dtype)
            x = torch.randn(65, 129, dtype=dtype)
            assert torch.equal(layer(x), linear(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_zero_B_adds_nothing_in_half_on_either_plan(self, dtype, base_gemm):
        layer = nk.FusedNeatLinear.from_linear(nn.Linear(129, 257, dtype=dtype), r=5)
        x = torch.randn(600, 129, dtype=dtype)
        before = layer(x)
        layer.reset_adapter()
        assert torch.equal(layer(x), before)
        # Integers that fp32 sums exactly leave one rounding, so both plans must give the frozen layer's bits.
        with torch.no_grad():
            layer.weight.copy_(torch.randint(-8, 9, layer.weight.shape))
            layer.bias.copy_(torch.randint(-8, 9, layer.bias.shape))
        x = torch.randint(-8, 9, x.shape).to(dtype)
        assert torch.equal(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()).to(dtype))

    def test_a_conv1d_too(self):
        conv = make_conv1d(10, 12, torch.float32)
        layer = nk.FusedNeatLinear.from_linear(conv, r=3)
        x = torch.randn(2, 5, 12)
        assert torch.equal(layer(x), conv(x))

    def test_with_dropout(self):
        linear = nn.Linear(12, 10)
        layer = nk.FusedNeatLinear.from_linear(linear, r=3, dropout=0.5).train()
        x = torch.randn(5, 12)
        assert torch.equal(layer(x), linear(x))


class TestShapes:
    @pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)], ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_any_rank_and_no_tokens(self, orientation, shape):
        layer = make(orientation=orientation, depth=1, activation="gelu")
        layer.bias.requires_grad_(True)
        x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
        y = layer(x)
        assert tuple(y.shape) == (*shape[:-1], 10)
        expected = reference(layer, x)
        torch.testing.assert_close(y, expected)
        wanted = [x, layer.bias, *adapter(layer)]
        dy = torch.randn_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "storage offset"])
    def test_strided_inputs(self, layout):
        layer = make()
        x = {
            "transposed": lambda: torch.randn(12, 5, dtype=DOUBLE).t(),
            "expanded": lambda: torch.randn(12, dtype=DOUBLE).expand(5, 12),
            "sliced": lambda: torch.randn(5, 24, dtype=DOUBLE)[:, ::2],
            "storage offset": lambda: torch.randn(61, dtype=DOUBLE)[1:].view(5, 12),
        }[layout]()
        torch.testing.assert_close(layer(x), layer(x.contiguous().clone()))

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize(("sizes", "r"), [((12, 10), 1), ((3, 5), 9), ((5, 3), 64), ((1, 1), 2)], ids=str)
    def test_any_rank_of_the_adapter(self, sizes, r, orientation):
        layer = make(*sizes, r=r, orientation=orientation, depth=1, activation="tanh")
        x = torch.randn(4, sizes[0], dtype=DOUBLE, requires_grad=True)
        y, expected = layer(x), reference(layer, x)
        torch.testing.assert_close(y, expected)
        wanted = [x, *adapter(layer)]
        for ours, theirs in zip(
            torch.autograd.grad(y.pow(2).sum(), wanted),
            torch.autograd.grad(expected.pow(2).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)

    def test_conv1d_equals_the_linear_of_its_transpose(self):
        conv = make_conv1d(10, 12)
        linear = nn.Linear(12, 10, dtype=DOUBLE)
        with torch.no_grad():
            linear.weight.copy_(conv.weight.t())
            linear.bias.copy_(conv.bias)
        layers = [nk.FusedNeatLinear.from_linear(m, r=3, depth=1, activation="silu") for m in (conv, linear)]
        nn.init.normal_(layers[0].neat_B)
        layers[1].load_state_dict({k: v for k, v in layers[0].state_dict().items() if "neat" in k}, strict=False)
        assert layers[0].state_dict()["weight"].shape == (12, 10)
        x = torch.randn(5, 12, dtype=DOUBLE, requires_grad=True)
        outputs = [layer(x) for layer in layers]
        torch.testing.assert_close(*outputs)
        gradients = [
            torch.autograd.grad(y.pow(2).sum(), [x, *adapter(layer)]) for y, layer in zip(outputs, layers, strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


class TestGradientsAskedFor:
    def test_a_frozen_adapter_in_train_mode_computes_nothing_of_the_weight_side(self):
        layer = make(depth=1).requires_grad_(False).train()
        x = torch.randn(5, 12, dtype=DOUBLE, requires_grad=True)
        with CountOps() as ops:
            y = layer(x)
            y.backward(torch.ones_like(y))
        assert ops.arguments["neat_linear_backward"][0][14:19] == (True, None, None, False, None)
        torch.testing.assert_close(x.grad, torch.ones_like(y) @ (layer.weight + layer.delta_weight()))

    def test_nothing_at_all_to_train_builds_no_graph(self):
        layer = make().requires_grad_(False)
        assert not layer(torch.randn(5, 12, dtype=DOUBLE)).requires_grad

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("trained", ["bias", "neat_A", "neat_B", "neat_encoders.0", "neat_decoders.0", "x"])
    def test_each_gradient_alone(self, trained, orientation):
        layer = make(depth=1, activation="gelu", orientation=orientation).requires_grad_(False)
        x = torch.randn(5, 12, dtype=DOUBLE)
        one = x if trained == "x" else layer.get_parameter(trained)
        one.requires_grad_(True)
        (ours,) = torch.autograd.grad(layer(x).pow(2).sum(), one)
        (theirs,) = torch.autograd.grad(reference(layer, x).pow(2).sum(), one)
        torch.testing.assert_close(ours, theirs)

    def test_dx_is_not_computed_when_nobody_asks(self):
        layer = make()
        with CountOps() as ops:
            layer(torch.randn(5, 12, dtype=DOUBLE)).sum().backward()
        need_dx, *needs = ops.arguments["neat_linear_backward"][0][14:19]
        assert not need_dx
        assert needs == [DOUBLE, DOUBLE, False, None]

    def test_a_second_backward_through_a_retained_graph_gives_the_same(self):
        layer = make(depth=1)
        x = torch.randn(5, 12, dtype=DOUBLE, requires_grad=True)
        loss, wanted = layer(x).pow(2).sum(), [x, *adapter(layer)]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(loss, wanted), strict=True):
            assert torch.equal(a, b)

    def test_backward_leaves_inputs_and_gradient_alone(self):
        layer = make(dropout=0.5)
        x, dy = torch.randn(5, 12, dtype=DOUBLE, requires_grad=True), torch.randn(5, 10, dtype=DOUBLE)
        before = copy.deepcopy([x.detach(), dy, *(p.detach() for p in layer.parameters())])
        layer(x).backward(dy)
        for a, b in zip(before, [x.detach(), dy, *layer.parameters()], strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("wanted", ["x", "neat_A", "neat_B"])
    def test_double_backward_is_refused(self, wanted):
        layer = make(activation="gelu")
        x = torch.randn(5, 12, dtype=DOUBLE, requires_grad=True)
        one = x if wanted == "x" else layer.get_parameter(wanted)
        (g,) = torch.autograd.grad(layer(x).pow(2).sum(), one, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            g.sum().backward()

    @pytest.mark.parametrize("transform", [torch.func.jvp, torch.autograd.forward_ad], ids=["func", "forward_ad"])
    @pytest.mark.parametrize("depth", [0, 1])
    def test_jvp_is_refused(self, transform, depth):
        layer, x = make(depth=depth), torch.randn(5, 12, dtype=DOUBLE)
        with pytest.raises(RuntimeError, match="jvp"):
            if transform is torch.func.jvp:
                transform(layer, (x,), (torch.ones_like(x),))
            else:
                with transform.dual_level():
                    layer(transform.make_dual(x, torch.ones_like(x)))

    def test_jvp_in_a_parameter_is_refused(self):
        layer, x = make(depth=1), torch.randn(5, 12, dtype=DOUBLE)
        names = [name for name, _ in layer.named_parameters() if "neat" in name]
        for name in names:
            value = layer.get_parameter(name).detach()

            def call(p, name=name):
                return torch.func.functional_call(layer, {name: p}, (x,))

            with pytest.raises(RuntimeError, match="jvp"):
                torch.func.jvp(call, (value,), (torch.ones_like(value),))

    def test_vmap_equals_a_loop(self):
        layer, x = make(), torch.randn(3, 5, 12, dtype=DOUBLE)
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(one) for one in x]))


class TestCopies:
    @staticmethod
    def through_pickle(layer):
        return pickle.loads(pickle.dumps(layer))

    @staticmethod
    def through_torch_save(layer):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    @pytest.mark.parametrize("source", ["constructor", "linear", "conv1d"])
    @pytest.mark.parametrize("merged", [False, True])
    def test_a_copy_is_equal_and_independent(self, source, how, merged):
        base = {"constructor": None, "linear": nn.Linear(12, 10, dtype=DOUBLE), "conv1d": make_conv1d(10, 12)}[source]
        layer = make(depth=1) if base is None else nk.FusedNeatLinear.from_linear(base, r=3, depth=1)
        nn.init.normal_(layer.neat_B)
        if merged:
            layer.merge()
        layer.eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        with torch.no_grad():
            before = layer(x)
            copied = {
                "deepcopy": copy.deepcopy,
                "pickle": self.through_pickle,
                "torch.save": self.through_torch_save,
            }[how](layer)
            assert copied.merged is merged
            assert torch.equal(copied(x), before)
            assert same_tensors(copied.state_dict(), layer.state_dict())
            assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in layer.parameters()}
            if merged:
                copied.unmerge()
            copied.neat_B.zero_()
            copied.base_weight.zero_()
            assert torch.equal(copied(x), copied.bias.expand(5, 10))
            assert torch.equal(layer(x), before)

    def test_a_copy_of_a_swapped_layer_can_be_removed(self):
        model = nn.Sequential(nn.Linear(12, 10))
        model.eval()
        nk.apply_neat(model, nk.NeatConfig(r=3, target_modules=["0"]))
        copied = nk.remove_neat(copy.deepcopy(model))
        assert type(copied[0]) is nn.Linear
        assert copied[0].weight.data_ptr() != model[0].weight.data_ptr()
        assert torch.equal(copied[0].weight, model[0].weight)

    def test_a_pickle_carries_the_weight_once(self):
        plain, layer = nn.Linear(256, 256), nk.FusedNeatLinear.from_linear(nn.Linear(256, 256), r=1)
        plain_size, layer_size = (len(pickle.dumps(m)) for m in (plain, layer))
        assert layer_size < 1.5 * plain_size


class TestCheckpoints:
    def test_a_base_checkpoint_loads(self):
        linear, layer = nn.Linear(12, 10), nk.FusedNeatLinear(12, 10, r=3, depth=1)
        result = layer.load_state_dict(linear.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert result.missing_keys
        assert all(key.startswith("neat_") for key in result.missing_keys)
        x = torch.randn(5, 12)
        assert torch.equal(layer(x), linear(x))

    def test_a_base_conv1d_checkpoint_loads(self):
        conv, layer = make_conv1d(10, 12), nk.FusedNeatLinear.from_linear(make_conv1d(10, 12), r=3)
        layer.load_state_dict(conv.state_dict(), strict=False)
        assert torch.equal(layer.weight, conv.weight)

    @pytest.mark.parametrize("assign", [False, True])
    def test_round_trip(self, assign):
        source, layer = make(depth=2), make(depth=2)
        flags = {name: p.requires_grad for name, p in layer.named_parameters()}
        layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        x = torch.randn(5, 12, dtype=DOUBLE)
        assert torch.equal(layer(x), source(x))
        assert {name: p.requires_grad for name, p in layer.named_parameters()} == flags

    def test_assign_reaches_the_original_module(self):
        linear = nn.Linear(12, 10)
        layer = nk.FusedNeatLinear.from_linear(linear, r=3)
        before = weakref.ref(linear.weight)
        layer.load_state_dict(copy.deepcopy(nk.FusedNeatLinear(12, 10, r=3).state_dict()), assign=True)
        assert linear.weight is layer.weight
        assert linear.bias is layer.bias
        assert before() is None

    def test_hooks_that_know_their_module_outlive_the_layer(self):
        model = nn.Sequential(nn.Linear(4, 4))
        seen = []
        model[0].register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
        nk.apply_neat(model, nk.NeatConfig(r=2, target_modules=["0"]))
        for copied in (copy.deepcopy(model), model):
            nk.remove_neat(copied)
            copied.load_state_dict(copied.state_dict())
            assert seen.pop() is copied[0]

    def test_assign_onto_the_meta_device(self):
        source = make(dtype=torch.float32, depth=1)
        layer = nk.FusedNeatLinear(12, 10, r=3, depth=1, device="meta")
        layer.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(5, 12)
        assert torch.equal(layer(x), source(x))

    def test_a_wrong_rank_is_refused(self):
        with pytest.raises(RuntimeError, match="neat_A"):
            make(r=3).load_state_dict(make(r=4).state_dict())


class TestIdentities:
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("conv", [False, True])
    def test_the_factors_are_the_update(self, orientation, activation, conv):
        base = make_conv1d(10, 12) if conv else nn.Linear(12, 10, dtype=DOUBLE)
        layer = nk.FusedNeatLinear.from_linear(
            base, r=3, orientation=orientation, activation=activation, scaling=0.3, depth=1
        )
        nn.init.normal_(layer.neat_B)
        lora_A, lora_B = layer.lora_factors()
        assert lora_A.shape == (3, 12)
        assert lora_B.shape == (10, 3)
        assert torch.equal(lora_B @ lora_A, layer.delta_weight())
        W = base.weight.t() if conv else base.weight
        H = nk.reference.neat_features(
            W,
            layer.neat_A,
            encoders=tuple(layer.neat_encoders),
            decoders=tuple(layer.neat_decoders),
            orientation=orientation,
            activation=activation,
        )
        delta = (H @ layer.neat_B.t()).t() if orientation == "out" else H @ layer.neat_B.t()
        torch.testing.assert_close(layer.delta_weight(), 0.3 * delta.detach())
        x = torch.randn(5, 12, dtype=DOUBLE)
        torch.testing.assert_close(layer(x), F.linear(x, W + layer.delta_weight(), layer.bias))
        assert not lora_A.requires_grad
        assert not lora_B.requires_grad

    def test_the_formula_written_out(self):
        layer = nk.FusedNeatLinear(2, 2, bias=False, r=1, dtype=DOUBLE)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
            layer.neat_A.copy_(torch.tensor([[1.0, 1.0]]))
            layer.neat_B.copy_(torch.tensor([[10.0], [100.0]]))
        # Z = Wᵀ·Aᵀ = (4, -2), H = (4, 0), ΔW = B·Hᵀ
        assert layer.delta_weight().tolist() == [[40.0, 0.0], [400.0, 0.0]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_they_are_float32_under_autocast_too(self, dtype):
        layer = nk.FusedNeatLinear.from_linear(nn.Linear(64, 48, dtype=dtype), r=3)
        nn.init.normal_(layer.neat_B)
        outside = (*layer.lora_factors(), layer.delta_weight())
        with torch.autocast("cpu", torch.bfloat16):
            inside = (*layer.lora_factors(), layer.delta_weight())
        for a, b in zip(outside, inside, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert torch.equal(a, b)

    def test_writing_to_the_factors_does_not_reach_the_layer(self):
        for orientation in ORIENTATIONS:
            layer = make(orientation=orientation, scaling=1.0)
            before = {k: v.clone() for k, v in layer.state_dict().items()}
            for factor in layer.lora_factors():
                factor.zero_()
            assert same_tensors(before, layer.state_dict())


BAD_OPTIONS = {
    "r=0": ({"r": 0}, ValueError, "at least 1, got 0"),
    "r=-1": ({"r": -1}, ValueError, "at least 1, got -1"),
    "r=2.0": ({"r": 2.0}, TypeError, "r must be an int, got float"),
    "r=True": ({"r": True}, TypeError, "r must be an int, got bool"),
    "r=None": ({"r": None}, TypeError, "r must be an int, got NoneType"),
    "depth=-1": ({"depth": -1}, ValueError, "at least 0, got -1"),
    "depth=1.5": ({"depth": 1.5}, TypeError, "depth must be an int, got float"),
    "orientation": ({"orientation": "up"}, ValueError, "'out', 'in'; got 'up'"),
    "orientation=None": ({"orientation": None}, ValueError, "got None"),
    "activation": ({"activation": "ReLU"}, ValueError, "'relu'.*got 'ReLU'"),
    "activation=callable": ({"activation": F.relu}, ValueError, "'relu'.*got "),
    "backend": ({"backend": "cuda"}, ValueError, "'auto', 'torch', 'triton'; got 'cuda'"),
    "scaling=nan": ({"scaling": float("nan")}, ValueError, "finite, got nan"),
    "scaling=inf": ({"scaling": float("inf")}, ValueError, "finite, got inf"),
    "scaling=str": ({"scaling": "1"}, TypeError, "scaling must be a float, got str"),
    "dropout=1": ({"dropout": 1.0}, ValueError, r"\[0, 1\), got 1.0"),
    "dropout<0": ({"dropout": -0.1}, ValueError, r"\[0, 1\), got -0.1"),
    "dropout=nan": ({"dropout": float("nan")}, ValueError, "got nan"),
    "dropout=str": ({"dropout": "0.1"}, TypeError, "dropout must be a float, got str"),
    "dropout=None": ({"dropout": None}, TypeError, "dropout must be a float, got NoneType"),
    "compute_dtype=int": ({"compute_dtype": torch.int32}, ValueError, "float32.*got torch.int32"),
    "compute_dtype=str": ({"compute_dtype": "float32"}, ValueError, "float32.*got 'float32'"),
    "compute_dtype=fp8": ({"compute_dtype": torch.float8_e4m3fn}, ValueError, "float32.*got torch.float8"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD_OPTIONS)
    def test_options(self, case):
        options, error, message = BAD_OPTIONS[case]
        with pytest.raises(error, match=message):
            nk.FusedNeatLinear(12, 10, **options)
        linear = nn.Linear(12, 10)
        with pytest.raises(error, match=message):
            nk.FusedNeatLinear.from_linear(linear, **options)
        assert linear.weight.requires_grad
        assert linear.bias.requires_grad
        with pytest.raises(error, match=message):
            nk.NeatConfig(target_modules=["0"], **options)

    @pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
    def test_sizes(self, sizes):
        with pytest.raises(ValueError, match=r"_features must be at least 1, got"):
            nk.FusedNeatLinear(*sizes)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn, torch.bool], ids=str)
    def test_dtypes(self, dtype):
        with pytest.raises(ValueError, match=f"float64, float32, bfloat16 or float16.*got {dtype}"):
            nk.FusedNeatLinear(12, 10, dtype=dtype)
        linear = nn.Linear(12, 10)
        with pytest.raises(ValueError, match=f"float64, float32, bfloat16 or float16.*got {dtype}"):
            nk.FusedNeatLinear.from_linear(linear, dtype=dtype)
        assert linear.weight.requires_grad

    @pytest.mark.parametrize("kind", ["meta", "int8", "float8", "complex", "subclass", "parametrized", "weight_norm"])
    def test_weights(self, kind):
        linear = nn.Linear(12, 10, device="meta" if kind == "meta" else None)
        quantised = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "complex": torch.complex64}
        if kind in quantised:
            linear.weight = nn.Parameter(linear.weight.detach().to(quantised[kind]), requires_grad=False)
        if kind == "subclass":
            linear.weight = type("Codes", (nn.Parameter,), {})(linear.weight.detach())
        if kind == "parametrized":
            nn.utils.parametrizations.weight_norm(linear)
        if kind == "weight_norm":
            linear.register_parameter("weight_g", nn.Parameter(torch.ones(10)))
            weight = linear._parameters.pop("weight")
            linear.weight = weight.detach()
        flags = {name: p.requires_grad for name, p in linear.named_parameters()}
        with pytest.raises(ValueError, match="expected"):
            nk.FusedNeatLinear.from_linear(linear)
        assert {name: p.requires_grad for name, p in linear.named_parameters()} == flags

    @pytest.mark.parametrize(
        "module", [nn.Conv1d(3, 4, 1), nn.Embedding(3, 4), nn.Bilinear(2, 2, 2), nn.ReLU()], ids=lambda m: m._get_name()
    )
    def test_modules(self, module):
        with pytest.raises(TypeError, match=f"expected nn.Linear.*got {type(module).__name__}"):
            nk.FusedNeatLinear.from_linear(module)

    def test_a_neat_layer(self):
        with pytest.raises(TypeError, match=r"expected nn.Linear.*got FusedNeatLinear"):
            nk.FusedNeatLinear.from_linear(make())

    def test_a_linear_with_a_forward_of_its_own(self):
        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        linear = Doubled(12, 10)
        with pytest.raises(TypeError, match="Doubled"):
            nk.FusedNeatLinear.from_linear(linear)
        assert linear.weight.requires_grad

    def test_another_device(self):
        linear = nn.Linear(12, 10)
        with pytest.raises(ValueError, match="device cpu, got meta"):
            nk.FusedNeatLinear.from_linear(linear, device="meta")
        assert linear.weight.requires_grad

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.randn(()), r"\[\.\.\., 12\]"),
            (torch.randn(5, 11), r"\[\.\.\., 12\].*got \(5, 11\)"),
            (torch.randn(12, 5), r"\[\.\.\., 12\].*got \(12, 5\)"),
            (torch.randn(5, 12, dtype=DOUBLE), "float32.*got torch.float64"),
            (torch.randn(5, 12, dtype=torch.bfloat16), "float32.*got torch.bfloat16"),
            (torch.ones(5, 12, dtype=torch.int64), "got torch.int64"),
            (torch.randn(5, 12, device="meta"), "cpu, got meta"),
        ],
        ids=["rank 0", "width", "transposed", "float64", "bfloat16", "int64", "device"],
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_inputs(self, x, message, training):
        layer = make(dtype=torch.float32).train(training)
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
            layer(x)

    @pytest.mark.parametrize("training", [False, True])
    def test_a_trainable_weight(self, training):
        layer = make().train(training).requires_grad_(True)
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match="frozen, got requires_grad=True"):
            layer(torch.randn(5, 12, dtype=DOUBLE))

    def test_a_weight_on_the_meta_device_at_forward(self):
        with pytest.raises(ValueError, match="meta"):
            nk.FusedNeatLinear(12, 10, device="meta")(torch.randn(5, 12, device="meta"))

    @pytest.mark.parametrize("attribute", ["orientation", "activation", "backend"])
    def test_an_attribute_set_to_nonsense(self, attribute):
        layer = make()
        setattr(layer, attribute, "nonsense")
        with pytest.raises(ValueError, match=f"{attribute} must be one of .*got 'nonsense'"):
            layer(torch.randn(5, 12, dtype=DOUBLE))

    def test_an_explicit_backend_that_cannot_run(self):
        from neat_kernels.plan import available_backends

        layer = make(backend="triton", dtype=torch.float32)
        reason = available_backends()["triton"]
        assert reason is not None, "rewrite this test where the Triton backend runs on a CPU"
        for call in (layer, layer.explain):
            with pytest.raises(nk.BackendUnavailableError, match="'triton' was requested"):
                call(torch.randn(5, 12))

    def test_chain_tensors_that_do_not_fit(self):
        layer = make(depth=1)
        layer.neat_encoders[0] = nn.Parameter(torch.zeros(4, 4, dtype=DOUBLE))
        with pytest.raises(ValueError, match=r"encoders\[0\] must be \[3, 3\].*got \(4, 4\)"):
            layer(torch.randn(5, 12, dtype=DOUBLE))


class TestGradModes:
    @pytest.mark.parametrize("training", [False, True])
    def test_inference_mode(self, training):
        layer = make(dtype=torch.float32).train(training)
        x = torch.randn(5, 12)
        expected = layer(x).detach()
        with torch.inference_mode():
            y = layer(x)
        assert y.is_inference()
        assert torch.equal(y, expected)
        layer(x).sum().backward()
        assert layer.neat_A.grad is not None

    def test_a_layer_born_in_inference_mode_still_infers(self):
        with torch.inference_mode():
            layer = make().eval()
            x = torch.randn(5, 12, dtype=DOUBLE)
            y = layer(x)
            assert torch.equal(layer(x), y)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)

    def test_dropout_is_off_in_eval_and_on_in_training(self):
        layer = make(dropout=0.5)
        x = torch.randn(64, 12, dtype=DOUBLE)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        torch.testing.assert_close(layer(x), reference(layer, x))

    def test_the_seed_of_dropout_is_torchs(self):
        layer, x = make(dropout=0.5), torch.randn(64, 12, dtype=DOUBLE)
        torch.manual_seed(5)
        first = layer(x)
        torch.manual_seed(5)
        assert torch.equal(layer(x), first)
