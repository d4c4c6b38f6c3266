"""The inference cache of features: it saves work where nothing changed, and never, ever, gives a stale answer."""

import copy
import io
import pickle

import pytest
import torch
from counting import CountOps
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import stateless

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

IN, OUT = 12, 10


@pytest.fixture
def x():
    return torch.randn(5, IN)


def make(**options):
    layer = nk.FusedNeatLinear(IN, OUT, **{"r": 3, "depth": 1, "activation": "gelu", **options})
    nn.init.normal_(layer.neat_B)
    return layer.eval()


def feature_passes(layer, x):
    with CountOps() as ops:
        layer(x)
    return ops.features


def truth(layer, x):
    """What the layer must compute with the values that its parameters have now."""
    fresh = nk.FusedNeatLinear(IN, OUT, r=3, depth=1, activation=layer.activation, orientation=layer.orientation)
    fresh.load_state_dict(layer.state_dict())
    return fresh(x).detach()


def is_right(layer, x):
    return torch.equal(layer(x), truth(layer, x))


class TestHits:
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("depth", [0, 1])
    def test_the_second_call_reads_no_weight_for_features(self, depth, orientation, x):
        layer = make(orientation=orientation, depth=depth)
        uncached = layer(x).detach()
        with torch.no_grad():
            assert feature_passes(layer, x) == 1
            assert feature_passes(layer, x) == 0
            assert torch.equal(layer(x), uncached)
            assert feature_passes(layer, torch.randn(2, 3, IN)) == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
    def test_hits_are_bit_equal_in_every_dtype(self, dtype, compute_dtype):
        if dtype == torch.float64:
            compute_dtype = None
        linear = nn.Linear(IN, OUT, dtype=dtype).eval()
        layer = nk.FusedNeatLinear.from_linear(linear, r=3, compute_dtype=compute_dtype)
        nn.init.normal_(layer.neat_B)
        x = torch.randn(5, IN, dtype=dtype)
        uncached = layer(x).detach()
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(layer(x), uncached)

    def test_no_cache_with_gradients_or_in_training(self, x):
        layer = make()
        with torch.no_grad():
            layer(x)
        assert [feature_passes(layer, x) for _ in range(2)] == [1, 1]
        assert layer(x).requires_grad
        layer.train()
        with torch.no_grad():
            assert [feature_passes(layer, x) for _ in range(2)] == [1, 1]

    def test_modes_that_switch_gradients_off_share_it(self, x):
        layer = make()
        with torch.inference_mode():
            assert feature_passes(layer, x) == 1
        with torch.no_grad():
            assert feature_passes(layer, x) == 0
            y = layer(x)
            assert not y.is_inference()
        with torch.inference_mode():
            assert feature_passes(layer, x) == 0
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None

    def test_autocast_has_its_own_factors(self, x):
        layer = make()
        with torch.no_grad():
            plain = layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert feature_passes(layer, x) == 1
                half = layer(x)
            assert half.dtype == torch.bfloat16
            assert torch.equal(layer(x), plain)
            with torch.autocast("cpu", torch.float16):
                assert layer(x).dtype == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x).detach(), half)

    def test_a_frozen_adapter_is_cached_too(self, x):
        layer = make().requires_grad_(False)
        with torch.no_grad():
            assert [feature_passes(layer, x) for _ in range(2)] == [1, 0]


def optimizer_step(layer, optimizer):
    layer.zero_grad()
    layer(torch.randn(5, IN)).pow(2).sum().backward()
    optimizer(layer.parameters(), lr=0.1).step()


CHANGES = {
    "sgd step": lambda layer: optimizer_step(layer, torch.optim.SGD),
    "adamw step": lambda layer: optimizer_step(layer, torch.optim.AdamW),
    "adamw foreach step": lambda layer: optimizer_step(layer, lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True)),
    "adamw fused step": lambda layer: optimizer_step(layer, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "in-place A": lambda layer: layer.neat_A.mul_(2),
    "in-place B": lambda layer: layer.neat_B.mul_(2),
    "in-place W": lambda layer: layer.weight.mul_(2),
    "in-place encoder": lambda layer: layer.neat_encoders[0].mul_(2),
    "in-place decoder": lambda layer: layer.neat_decoders[0].mul_(2),
    "a row of A": lambda layer: layer.neat_A[1].zero_(),
    "copy_": lambda layer: layer.neat_B.copy_(torch.ones(OUT, 3)),
    "foreach": lambda layer: torch._foreach_mul_([layer.neat_A, layer.neat_B], 2.0),
    "bias": lambda layer: layer.bias.add_(1),
    "reset_adapter": lambda layer: layer.reset_adapter(),
    "load_state_dict": lambda layer: layer.load_state_dict(make().state_dict()),
    "load_state_dict assign": lambda layer: layer.load_state_dict(make().state_dict(), assign=True),
    "load part": lambda layer: layer.load_state_dict({"neat_A": torch.ones(3, OUT)}, strict=False),
    "load encoders": lambda layer: layer.load_state_dict({"neat_encoders.0": torch.ones(3, 3)}, strict=False),
    "assign encoders": lambda layer: layer.load_state_dict(
        {"neat_encoders.0": torch.ones(3, 3)}, strict=False, assign=True
    ),
    "a new parameter": lambda layer: setattr(layer, "neat_A", nn.Parameter(torch.ones(3, OUT))),
    "a new encoder": lambda layer: layer.neat_encoders.__setitem__(0, nn.Parameter(torch.ones(3, 3))),
    "data and invalidate": lambda layer: (layer.neat_A.data.mul_(2), layer.invalidate()),
    "data of W and invalidate": lambda layer: (layer.weight.data.mul_(2), layer.invalidate()),
    "data and train": lambda layer: (layer.neat_A.data.mul_(2), layer.train(), layer.eval()),
    "set data and invalidate": lambda layer: (setattr(layer.neat_A, "data", torch.ones(3, OUT)), layer.invalidate()),
    "parameters_to_vector": lambda layer: (
        nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in layer.parameters())), layer.parameters()),
        layer.invalidate(),
    ),
    "another activation": lambda layer: setattr(layer, "activation", "tanh"),
}


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_change_is_seen(self, mode, change, x):
        layer = make()
        with mode():
            before = layer(x)
        if "step" in change or mode is torch.inference_mode:
            CHANGES[change](layer.requires_grad_(False) if "step" not in change else layer)
        else:
            with torch.no_grad():
                CHANGES[change](layer)
        with mode():
            first, second = layer(x), layer(x)
        assert torch.equal(first, truth(layer, x))
        assert torch.equal(first, second)
        assert not torch.equal(first, before)

    @pytest.mark.parametrize("drop", ["train", "eval", "to", "double and back", "load", "merge", "invalidate"])
    def test_what_drops_it(self, drop, x):
        layer = make()
        with torch.no_grad():
            layer(x)
            {
                "train": lambda: layer.train().eval(),
                "eval": layer.eval,
                "to": lambda: layer.to("cpu"),
                "double and back": lambda: layer.double().float(),
                "load": lambda: layer.load_state_dict(layer.state_dict()),
                "merge": lambda: (layer.merge(), layer.unmerge()),
                "invalidate": layer.invalidate,
            }[drop]()
            assert [feature_passes(layer, x) for _ in range(2)] == [1, 0]
            assert is_right(layer, x)

    def test_dropping_frees_the_memory(self, x):
        layer = make()
        for drop in (layer.train, layer.invalidate, lambda: layer.to("cpu")):
            layer.eval()
            with torch.no_grad():
                layer(x)
            assert layer._cache.factors is not None
            drop()
            assert layer._cache.factors is None

    def test_a_parent_modules_methods_reach_it(self, x):
        layer = make()
        model = nn.Sequential(layer)
        for act in (model.train, lambda: model.double().float(), lambda: model.load_state_dict(model.state_dict())):
            model.eval()
            with torch.no_grad():
                model(x)
                layer.neat_A.data.mul_(2)
            act()
            model.eval()
            with torch.no_grad():
                assert is_right(layer, x)

    def test_merge_and_unmerge(self, x):
        layer = make()
        with torch.no_grad():
            before = layer(x)
            layer.merge()
            merged = layer(x)
            assert torch.equal(merged, F.linear(x, layer.weight, layer.bias))
            layer.neat_A.mul_(2)
            layer.unmerge()
            assert not torch.equal(layer(x), before)
            assert is_right(layer, x)

    def test_a_swapped_tensor(self, x):
        # Identity and version number stay what they were: only a cache that holds no weak reference, or looks deeper,
        # is right; torch itself refuses to swap a tensor that has one.
        layer = make()
        with torch.no_grad():
            layer(x)
        try:
            torch.utils.swap_tensors(layer.neat_A, nn.Parameter(torch.ones(3, OUT)))
        except RuntimeError as error:
            assert "weakref" in str(error)  # noqa: PT017
        with torch.no_grad():
            assert is_right(layer, x)

    @pytest.mark.parametrize("forward", ["compiled", "gradients written by hand"])
    def test_a_fused_step_after_a_forward_that_the_cache_did_not_see(self, forward, x):
        torch._dynamo.reset()
        layer = make()
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
        compiled = torch.compile(layer, backend="eager")
        with torch.no_grad():
            before = layer(x)
        if forward == "compiled":
            compiled(x).pow(2).sum().backward()
        else:
            for p in trained:
                p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert not torch.equal(layer(x), before)
            assert is_right(layer, x)

    def test_deepcopy_then_step_on_the_copy(self, x):
        layer = make()
        with torch.no_grad():
            before = layer(x)
        copied = copy.deepcopy(layer)
        optimizer_step(copied, torch.optim.AdamW)
        with torch.no_grad():
            assert is_right(copied, x)
            assert torch.equal(layer(x), before)
            assert feature_passes(layer, x) == 0

    def test_deepcopy_then_step_on_the_original(self, x):
        layer = make()
        with torch.no_grad():
            before = layer(x)
        copied = copy.deepcopy(layer)
        with torch.no_grad():
            copied(x)
        optimizer_step(layer, torch.optim.AdamW)
        with torch.no_grad():
            assert is_right(layer, x)
            assert torch.equal(copied(x), before)


class TestSwappedIn:
    """Parameters that somebody else put in the place of the layer's: FSDP2, functional_call, parametrizations."""

    @pytest.mark.parametrize("call", [torch.func.functional_call, stateless.functional_call])
    @pytest.mark.parametrize("name", ["neat_A", "neat_B", "weight", "neat_encoders.0"])
    def test_functional_call(self, name, call, x):
        layer = make()
        with torch.no_grad():
            before = layer(x)
            values = [torch.randn_like(layer.get_parameter(name)) for _ in range(2)]
            outputs = [call(layer, {name: v}, (x,)) for v in values]
            for v, y in zip(values, outputs, strict=True):
                other = copy.deepcopy(layer)
                other.get_parameter(name).copy_(v)
                assert torch.equal(y, truth(other, x))
            assert torch.equal(layer(x), before)
            values[0].data.mul_(2)
            other.get_parameter(name).copy_(values[0])
            assert torch.equal(call(layer, {name: values[0]}, (x,)), truth(other, x))

    @pytest.mark.parametrize("name", ["neat_A", "neat_B", "weight"])
    @pytest.mark.parametrize("after", ["nothing", "eval", "train"])
    def test_a_parameter_whose_data_changes_without_a_version(self, after, name, x):
        layer = make()
        with torch.no_grad():
            layer(x)
            layer._parameters[name] = nn.Parameter(torch.randn_like(layer.get_parameter(name)), requires_grad=False)
            {"nothing": lambda: None, "eval": layer.eval, "train": lambda: layer.train().eval()}[after]()
            assert is_right(layer, x)
            version = layer.get_parameter(name)._version
            layer.get_parameter(name).data.mul_(2)
            assert layer.get_parameter(name)._version == version
            assert is_right(layer, x)

    def test_an_encoder_whose_data_changes_without_a_version(self, x):
        layer = make()
        with torch.no_grad():
            layer(x)
            layer.neat_encoders._parameters["0"] = nn.Parameter(torch.randn(3, 3), requires_grad=False)
            assert is_right(layer, x)
            layer.neat_encoders[0].data.mul_(2)
            assert is_right(layer, x)

    def test_the_own_parameters_swapped_out_and_back_in(self, x):
        layer = make()
        own = layer.neat_A
        with torch.no_grad():
            before = layer(x)
            layer._parameters["neat_A"] = nn.Parameter(torch.randn_like(own), requires_grad=False)
            assert is_right(layer, x)
            layer._parameters["neat_A"] = own
            assert torch.equal(layer(x), before)

    def test_a_tensor_subclass_is_not_trusted(self, x):
        class Sharded(nn.Parameter):
            """Stands for DTensor: a parameter of a class of its own."""

        layer = make()
        layer._parameters["neat_A"] = Sharded(torch.randn(3, OUT), requires_grad=False)
        layer.invalidate()
        with torch.no_grad():
            assert is_right(layer, x)
            layer.neat_A.data.mul_(2)
            assert is_right(layer, x)


class TestTransformsAndTracers:
    def test_vmap_neither_reads_nor_writes(self, x):
        layer = make()
        batch = torch.randn(3, 5, IN)
        with torch.no_grad():
            torch.vmap(layer)(batch)
            assert layer._cache.factors is None
            stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
            y = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
            torch.testing.assert_close(y[0], truth(layer, x))
            assert is_right(layer, x)

    def test_a_fake_run_leaves_nothing_behind(self, x):
        from torch._subclasses.fake_tensor import FakeTensorMode

        layer = make()
        with torch.no_grad():
            with FakeTensorMode(allow_non_fake_inputs=True):
                layer(x)
            y = layer(x)
            assert type(y) is torch.Tensor
            assert is_right(layer, x)

    @pytest.mark.parametrize("warm", [False, True])
    def test_make_fx_records_the_features(self, warm, x):
        from torch.fx.experimental.proxy_tensor import make_fx

        layer = make()
        with torch.no_grad():
            if warm:
                layer(x)
            graph = make_fx(layer)(x)
            layer.neat_A.mul_(2)
            assert torch.equal(graph(x), truth(layer, x))
            assert is_right(layer, x)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("warm", [False, True])
    def test_a_jit_trace_records_the_features(self, warm, x):
        layer = make()
        with torch.no_grad():
            if warm:
                layer(x)
            traced = torch.jit.trace(layer, x, check_trace=False)
            layer.neat_A.mul_(2)
            assert torch.equal(traced(x), truth(layer, x))
            assert is_right(layer, x)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_two_compiled_calls_around_an_optimizer_step(self, backend, x):
        torch._dynamo.reset()
        layer = make()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        with torch.no_grad():
            layer(x)
            assert torch.equal(compiled(x), truth(layer, x))
        optimizer_step(layer, torch.optim.AdamW)
        with torch.no_grad():
            assert torch.equal(compiled(x), truth(layer, x))
            layer.neat_A.data.mul_(2)
            layer.invalidate()
            assert torch.equal(compiled(x), truth(layer, x))
            layer.neat_A.data.mul_(2)
            assert torch.equal(compiled(x), truth(layer, x))

    def test_a_compiled_call_leaves_the_eager_cache_alone(self, x):
        torch._dynamo.reset()
        layer = make()
        with torch.no_grad():
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
            assert layer._cache.factors is None
            layer(x)
            factors = layer._cache.factors
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
            assert layer._cache.factors is factors


class TestNotSaved:
    def test_copies_and_checkpoints_do_not_carry_it(self, x):
        layer = make()
        cold = {"state": sorted(layer.state_dict()), "pickle": len(pickle.dumps(layer))}
        with torch.no_grad():
            layer(x)
        assert sorted(layer.state_dict()) == cold["state"]
        assert len(pickle.dumps(layer)) == cold["pickle"]
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
            with torch.no_grad():
                assert [feature_passes(other, x) for _ in range(2)] == [1, 0]
                assert is_right(other, x)
            with torch.no_grad():
                assert feature_passes(layer, x) == 0

    def test_a_call_with_gradients_neither_reads_nor_drops_it(self, x):
        layer = make()
        with torch.no_grad():
            layer(x)
        assert feature_passes(layer, x) == 1
        with torch.no_grad():
            assert feature_passes(layer, x) == 0

    def test_it_is_no_buffer_and_no_child(self, x):
        layer = make()
        with torch.no_grad():
            layer(x)
        assert not list(layer.buffers())
        assert {type(m) for m in layer.modules()} == {nk.FusedNeatLinear, nn.ParameterList}

    def test_it_keeps_no_parameter_alive(self, x):
        import gc
        import weakref

        layer = make()
        with torch.no_grad():
            layer(x)
        watched = weakref.ref(layer.neat_A)
        layer._parameters["neat_A"] = nn.Parameter(torch.randn(3, OUT))
        gc.collect()
        assert watched() is None

    def test_writing_into_an_output_does_not_reach_it(self, x):
        layer = make()
        with torch.no_grad():
            expected = layer(x).clone()
            layer(x).zero_()
            H = nk.functional.neat_features(layer.weight, layer.neat_A)
            H.zero_()
            for factor in layer.lora_factors():
                factor.zero_()
            assert torch.equal(layer(x), expected)


def test_models_with_many_layers_cache_each_on_its_own(x):
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, OUT))
    nk.apply_neat(model, nk.NeatConfig(r=2, target_modules="all-linear"))
    for layer in model:
        nn.init.normal_(layer.neat_B)
    model.eval()
    with torch.no_grad():
        assert [feature_passes(model, x) for _ in range(2)] == [2, 0]
        model[1].neat_A.mul_(2)
        assert [feature_passes(model, x) for _ in range(2)] == [1, 0]
        cached = model(x)
    assert torch.equal(model(x).detach(), cached)


def test_threads_with_different_dtypes_get_their_own_factors(x):
    import threading

    layer = make()
    with torch.no_grad():
        expected = {False: layer(x)}
        with torch.autocast("cpu", torch.bfloat16):
            expected[True] = layer(x)
    wrong = []

    def run(half):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            wrong.extend(half for _ in range(200) if not torch.equal(layer(x), expected[half]))

    threads = [threading.Thread(target=run, args=(half,)) for half in (False, True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("given", [torch.zeros(5, IN, dtype=torch.float64), torch.zeros(5, IN + 1), torch.zeros(())])
def test_a_hit_refuses_what_a_miss_refuses(given, x):
    layer = make()
    with pytest.raises(ValueError, match="x must") as missed:
        layer(given)
    with torch.no_grad():
        layer(x)
        with pytest.raises(ValueError, match="x must") as hit:
            layer(given)
    assert str(hit.value) == str(missed.value)
