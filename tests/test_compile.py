"""torch.compile and torch.export of the layer: no graph break, the same numbers, nothing baked in."""

import copy

import pytest
import torch
from models import make_case
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def make(dtype=DOUBLE, **options):
    layer = nk.FusedNeatLinear(12, 10, **{"r": 3, "dtype": dtype, "activation": "gelu", **options})
    nn.init.normal_(layer.neat_B)
    layer.bias.requires_grad_(True)
    return layer


def step(call, layer, x):
    """Output and gradients of one forward and backward."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


class TestLayer:
    @pytest.mark.parametrize("depth", [0, 1])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_forward_and_backward_in_one_graph(self, backend, orientation, depth):
        layer = make(orientation=orientation, depth=depth)
        x = torch.randn(2, 5, 12, dtype=DOUBLE)
        expected = step(layer, layer, x)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for _ in range(2):
            for a, b in zip(step(compiled, layer, x), expected, strict=True):
                assert torch.equal(a, b)

    def test_inductor(self):
        layer = make(orientation="in", depth=1)
        x = torch.randn(5, 12, dtype=DOUBLE)
        expected = step(layer, layer, x)
        assert_same(step(torch.compile(layer, fullgraph=True), layer, x), expected)

    def test_inductor_around_two_layers_and_a_step(self):
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)).double()
        nk.apply_neat(model, nk.NeatConfig(r=3, target_modules="all-linear", depth=1))
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.neat_B)
        plain = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True)
        x = torch.randn(5, 12, dtype=DOUBLE)
        for call, m in ((compiled, model), (plain, plain)):
            optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                call(x).pow(2).sum().backward()
                optimizer.step()
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])

    def test_dynamic_shapes_compile_once(self):
        layer, counter = make(), CompileCounterWithBackend("inductor")
        compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
        compiled_once = None
        for tokens in (5, 17, 3, 64):
            x = torch.randn(2, tokens, 12, dtype=DOUBLE)
            assert_same(step(compiled, layer, x), step(layer, layer, x))
            # dynamo itself may call the backend twice for one graph, to turn the float options into constants.
            compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once

    def test_one_token_and_none(self):
        layer = make()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for shape in ((1, 12), (0, 12), (12,)):
            x = torch.randn(shape, dtype=DOUBLE)
            assert_same(step(compiled, layer, x), step(layer, layer, x))

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_dropout_draws_a_new_mask_every_call(self, backend):
        layer = make(dropout=0.5)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        x = torch.randn(64, 12, dtype=DOUBLE)
        outputs = [step(compiled, layer, x) for _ in range(2)]
        assert not torch.equal(outputs[0][0], outputs[1][0])
        assert all(torch.isfinite(t).all() for t in outputs[0])
        # dU = s·dyᵀ·S and dx use one mask: with B as the only parameter y is linear in B, so ⟨dB, B⟩ = ⟨dy, y - y0⟩.
        layer.zero_grad()
        y = compiled(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        frozen = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close((layer.neat_B.grad * layer.neat_B).sum(), (dy * (y - frozen)).sum())
        compiled.eval()
        assert_same([compiled(x)], [layer(x)])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
    def test_autocast(self, compute_dtype, orientation, dtype):
        layer = make(torch.float32, orientation=orientation, depth=1, compute_dtype=compute_dtype)
        x = torch.randn(5, 12)

        def call(x):
            with torch.autocast("cpu", dtype):
                return layer(x)

        expected = step(call, layer, x)
        assert expected[0].dtype == dtype
        for a, b in zip(
            step(torch.compile(call, backend="aot_eager", fullgraph=True), layer, x), expected, strict=True
        ):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)

    def test_autocast_around_the_compiled_call(self):
        layer, x = make(torch.float32), torch.randn(5, 12)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ours, expected = compiled(x), layer(x)
            assert ours.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
            assert torch.equal(ours, expected)

    def test_fp32_adapters_over_a_half_weight(self):
        layer = nk.FusedNeatLinear.from_linear(nn.Linear(12, 10, dtype=torch.bfloat16), r=3, depth=1)
        nn.init.normal_(layer.neat_B)
        x = torch.randn(5, 12, dtype=torch.bfloat16)
        expected = step(layer, layer, x)
        ours = step(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, x)
        assert [t.dtype for t in ours] == [t.dtype for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("frozen", [(), ("neat_A",), ("neat_B",), ("neat_A", "neat_B", "bias")], ids=str)
    def test_whatever_is_frozen(self, frozen):
        layer = make()
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)
        x = torch.randn(5, 12, dtype=DOUBLE)
        assert_same(step(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, x), step(layer, layer, x))

    def test_flags_changed_after_compiling(self):
        layer = make()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, 12, dtype=DOUBLE)
        for trained in (True, False, True):
            layer.neat_A.requires_grad_(trained)
            assert_same(step(compiled, layer, x), step(layer, layer, x))

    def test_merging_after_compiling(self):
        layer = make().eval()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, 12, dtype=DOUBLE)
        with torch.no_grad():
            expected = layer(x)
            for change in (lambda: None, layer.merge, layer.unmerge):
                change()
                assert_same([compiled(x)], [layer(x)])
                torch.testing.assert_close(compiled(x), expected)

    @pytest.mark.parametrize("attribute", [("scaling", 0.25), ("activation", "tanh"), ("dropout", 0.5)], ids=str)
    def test_an_option_changed_after_compiling(self, attribute):
        layer = make()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, 12, dtype=DOUBLE)
        compiled(x)
        setattr(layer, *attribute)
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        assert_same([compiled(x)], [expected])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_eval(self, mode):
        layer = make().eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with mode():
            assert_same([compiled(x)], [layer(x)])

    def test_in_place_module_compile(self):
        layer = make()
        x = torch.randn(5, 12, dtype=DOUBLE)
        expected = step(layer, layer, x)
        layer.compile(backend="aot_eager", fullgraph=True)
        assert_same(step(layer, layer, x), expected)

    @pytest.mark.parametrize("bad", ["x", "weight"])
    def test_bad_input_is_refused_in_a_compiled_layer_too(self, bad):
        layer = make()
        compiled = torch.compile(layer, backend="aot_eager")
        if bad == "weight":
            layer.weight.requires_grad_(True)
        with pytest.raises((ValueError, RuntimeError), match=r"frozen|\[\.\.\., 12\]"):
            compiled(torch.randn(5, 11 if bad == "x" else 12, dtype=DOUBLE))


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("warm", [False, True])
    def test_the_eval_layer(self, warm, grad, strict):
        layer = make(depth=1).eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        if warm:
            with torch.no_grad():
                layer(x)
        tokens = torch.export.Dim("tokens", min=2)
        with torch.set_grad_enabled(grad):
            program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets.count("neat_kernels.neat_linear.default") == 1
        assert set(program.state_dict) == set(layer.state_dict())
        assert not program.constants
        with torch.no_grad():
            for n in (5, 9):
                x = torch.randn(n, 12, dtype=DOUBLE)
                assert torch.equal(program.module()(x), layer(x))
            assert (layer._cache.factors is None) or type(layer._cache.factors[0]) is torch.Tensor

    def test_parameters_stay_inputs(self):
        layer = make().eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        module = torch.export.export(layer, (x,)).module()
        other = make().eval()
        module.load_state_dict(other.state_dict())
        with torch.no_grad():
            assert torch.equal(module(x), other(x))

    def test_a_saved_program(self, tmp_path):
        layer = make().eval()
        x = torch.randn(5, 12, dtype=DOUBLE)
        path = str(tmp_path / "layer.pt2")
        torch.export.save(torch.export.export(layer, (x,)), path)
        with torch.no_grad():
            assert torch.equal(torch.export.load(path).module()(x), layer(x))


class TestModel:
    @pytest.mark.parametrize("name", ["llama", "vit"])
    def test_a_whole_model_in_one_graph(self, name):
        model, batch = make_case(name)
        model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        nk.apply_neat(model, nk.NeatConfig(r=3, target_modules="all-linear", depth=1, activation="gelu"))
        layers = [m for m in model.modules() if isinstance(m, nk.FusedNeatLinear)]
        for layer in layers:
            nn.init.normal_(layer.neat_B, std=0.02)
        model(**batch).loss.backward()
        expected = [layer.neat_A.grad.clone() for layer in layers]
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(**batch).loss.backward()
        assert_same([layer.neat_A.grad for layer in layers], expected)
        assert not counters["graph_break"]
