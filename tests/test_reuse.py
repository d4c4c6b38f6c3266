"""reuse_features: one features pass per block of micro-batches, with the gradients of plain accumulation."""

import copy

import pytest
import torch
from counting import CountOps
from torch import nn
from torch.utils.checkpoint import checkpoint

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

DOUBLE = torch.float64
MICRO_BATCHES = 4


class Model(nn.Module):
    def __init__(self, dtype, use_checkpoint=None, **options):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 4, dtype=dtype)
        self.use_checkpoint = use_checkpoint
        nk.apply_neat(self, nk.NeatConfig(**{"r": 3, "target_modules": "all-linear", **options}))
        for layer in (self.first, self.second):
            nn.init.normal_(layer.neat_B)

    def body(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        if self.use_checkpoint is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_checkpoint)


def make(dtype=DOUBLE, **options):
    return Model(dtype, **{"depth": 1, "activation": "gelu", **options})


@pytest.fixture
def batches():
    return [torch.randn(5, 6, dtype=DOUBLE) for _ in range(MICRO_BATCHES)]


def accumulate(model, batches, wrap=lambda loss: loss):
    for x in batches:
        wrap(model(x).pow(2).sum()).backward()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(model, batches):
    other = copy.deepcopy(model)
    other.use_checkpoint = None
    accumulate(other, batches)
    return gradients(other)


class TestGradients:
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("depth", [0, 2])
    def test_equal_plain_accumulation(self, depth, orientation, batches):
        model = make(depth=depth, orientation=orientation)
        expected = plain_gradients(model, batches)
        with nk.reuse_features(model):
            accumulate(model, batches)
        ours = gradients(model)
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name])

    def test_equal_the_reference(self, batches):
        model = make()
        layer = model.first
        with nk.reuse_features(layer):
            for x in batches:
                layer(x).pow(2).sum().backward()
        ours = gradients(layer)
        layer.zero_grad()
        for x in batches:
            y = nk.reference.neat_linear(
                x, layer.weight, layer.neat_A, layer.neat_B, layer.bias,
                encoders=tuple(layer.neat_encoders), decoders=tuple(layer.neat_decoders), activation="gelu",
            )  # fmt: skip
            y.pow(2).sum().backward()
        for name, expected in gradients(layer).items():
            torch.testing.assert_close(ours[name], expected)

    def test_add_to_gradients_from_before(self, batches):
        model = make()
        expected = plain_gradients(model, batches)
        accumulate(model, batches[:1])
        with nk.reuse_features(model):
            accumulate(model, batches[1:3])
        with nk.reuse_features(model):
            accumulate(model, batches[3:])
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_with_gradient_checkpointing(self, use_reentrant, batches):
        model = make(use_checkpoint=use_reentrant)
        expected = plain_gradients(model, batches)
        inputs = [x.clone().requires_grad_(use_reentrant) for x in batches]
        with nk.reuse_features(model):
            accumulate(model, inputs)
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    def test_with_dropout_the_masks_are_those_of_plain_accumulation(self, batches):
        model = make(dropout=0.5)
        torch.manual_seed(3)
        expected = plain_gradients(model, batches)
        torch.manual_seed(3)
        with nk.reuse_features(model):
            accumulate(model, batches)
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    @pytest.mark.parametrize("frozen", ["neat_A", "neat_B", "neat_encoders.0", "everything"])
    def test_frozen_parts_get_none(self, frozen, batches):
        model = make()
        for layer in (model.first, model.second):
            if frozen == "everything":
                layer.requires_grad_(False)
                layer.bias.requires_grad_(True)
            else:
                layer.get_parameter(frozen).requires_grad_(False)
        expected = plain_gradients(model, batches)
        with nk.reuse_features(model), CountOps() as ops:
            accumulate(model, batches)
        ours = gradients(model)
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name])
        if frozen == "everything":
            assert all(args[-4:-2] == (None, None) for args in ops.arguments["low_rank_linear_backward"])

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_under_autocast_the_gradients_have_their_parameters_dtypes(self, weight_dtype, batches):
        model = make(weight_dtype)
        with nk.reuse_features(model), torch.autocast("cpu", torch.bfloat16):
            accumulate(model, [x.to(weight_dtype) for x in batches])
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad.dtype == p.dtype, name
                assert p.grad.abs().sum() > 0, name

    def test_in_fp32_the_error_is_that_of_plain_accumulation(self, batches):
        model = make(torch.float32)
        exact = plain_gradients(copy.deepcopy(model).double(), batches)
        singles = [x.float() for x in batches]
        plain = plain_gradients(model, singles)
        with nk.reuse_features(model):
            accumulate(model, singles)
        for name, g in gradients(model).items():
            error, plain_error = ((t.double() - exact[name]).norm() for t in (g, plain[name]))
            # Both sum the same products over the tokens of all micro-batches, in another order.
            assert error <= 2 * plain_error + 2.0**-23 * exact[name].norm()

    def test_a_block_without_backward_leaves_no_gradients(self, batches):
        model = make()
        with nk.reuse_features(model):
            model(batches[0])
        assert not gradients(model)

    def test_an_optimizer_loop_trains_like_the_plain_one(self, batches):
        model, plain = make(), None
        plain = copy.deepcopy(model)
        for reuse, m in ((True, model), (False, plain)):
            optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)
            for _ in range(5):
                optimizer.zero_grad()
                if reuse:
                    with nk.reuse_features(m):
                        accumulate(m, batches)
                else:
                    accumulate(m, batches)
                optimizer.step()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


class TestWork:
    def test_one_features_pass_each_way(self, batches):
        model = make()
        with CountOps() as ops, nk.reuse_features(model):
            accumulate(model, batches)
        layers = 2
        assert ops.features == layers
        assert ops.calls["features_backward"] == layers
        assert ops.calls["low_rank_linear"] == ops.calls["low_rank_linear_backward"] == layers * MICRO_BATCHES

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_also_with_checkpointing(self, use_reentrant, batches):
        model = make(use_checkpoint=use_reentrant)
        with CountOps() as ops, nk.reuse_features(model):
            accumulate(model, [x.clone().requires_grad_() for x in batches])
        assert ops.features == ops.calls["features_backward"] == 2

    def test_outside_the_block_every_forward_computes_them(self, batches):
        model = make()
        with nk.reuse_features(model):
            accumulate(model, batches)
        with CountOps() as ops:
            accumulate(model, batches[:2])
        assert ops.calls["neat_linear"] == ops.calls["neat_linear_backward"] == 4

    def test_evaluation_inside(self, batches):
        model = make(dropout=0.5)
        expected = plain_gradients(model.eval(), batches)
        with torch.no_grad():
            held_out = model(batches[0])
        with nk.reuse_features(model):
            accumulate(model, batches[:2])
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert torch.equal(model(batches[0]), held_out)
            accumulate(model, batches[2:])
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    def test_nothing_is_kept_afterwards(self, batches):
        import weakref

        model = make()
        with nk.reuse_features(model):
            accumulate(model, batches)
            leaf = weakref.ref(model.first._reused.leaf)
        assert leaf() is None
        assert model.first._reused is None

    def test_a_copy_made_inside_is_not_in_the_block(self, batches):
        model = make()
        with nk.reuse_features(model):
            copied = copy.deepcopy(model)
            with torch.no_grad():
                copied.first.neat_A.mul_(2)
            expected = copied(batches[0])
            accumulate(model, batches)
        assert torch.equal(copied(batches[0]), expected)
        accumulate(copied, batches)
        assert gradients(copied)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_models(self, backend, batches):
        torch._dynamo.reset()
        model = make()
        expected = plain_gradients(model, batches)
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            model.zero_grad()
            with nk.reuse_features(model):
                accumulate(compiled, batches)
            for name, g in gradients(model).items():
                torch.testing.assert_close(g, expected[name])
            with torch.no_grad():
                model.first.neat_A.mul_(1.5)
            expected = plain_gradients(model, batches)
        model.zero_grad()
        accumulate(compiled, batches)
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_change_inside_is_seen_by_a_compiled_model(self, backend, batches):
        torch._dynamo.reset()
        model = make()
        compiled = torch.compile(model, backend=backend)
        with pytest.raises(RuntimeError, match="changed inside"), nk.reuse_features(model):
            compiled(batches[0])
            with torch.no_grad():
                model.first.neat_A.mul_(2)
            compiled(batches[0])
            pytest.fail("the stale forward ran")


class TestRefusals:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_an_optimizer_step_inside(self, optimizer, fused, batches):
        model = make()
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
        with pytest.raises(RuntimeError, match="changed inside"), nk.reuse_features(model):
            accumulate(model, batches[:1])
            optimizer.step()
            model(batches[0])
            pytest.fail("the stale forward ran")
        model(batches[0])

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_step_at_the_end_of_the_block(self, fused, batches):
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
        with pytest.raises(RuntimeError, match="changed inside"), nk.reuse_features(model):
            accumulate(model, batches)
            optimizer.step()
        model(batches[0])

    def test_a_change_of_one_layer_flushes_no_other(self, batches):
        model = make()
        with pytest.raises(RuntimeError, match="changed inside"), nk.reuse_features(model):
            accumulate(model, batches)
            with torch.no_grad():
                model.second.neat_A.mul_(2)
        assert model.first.neat_A.grad is None
        assert model.second.neat_A.grad is None

    @pytest.mark.parametrize("change", ["load", "assign", "new parameter", "to", "merge"])
    def test_other_changes_inside(self, change, batches):
        model, state = make(), copy.deepcopy(make().state_dict())
        with pytest.raises(RuntimeError, match="changed inside"), nk.reuse_features(model):
            model(batches[0])
            {
                "load": lambda: model.load_state_dict(state),
                "assign": lambda: model.load_state_dict(state, assign=True),
                "new parameter": lambda: setattr(model.first, "neat_A", nn.Parameter(model.first.neat_A * 2)),
                "to": model.float,
                "merge": model.first.merge,
            }[change]()

    @pytest.mark.parametrize("inner", ["model", "layer"])
    def test_nested(self, inner, batches):
        model = make()
        expected = plain_gradients(model, batches)
        with nk.reuse_features(model):
            accumulate(model, batches[:2])
            with (
                pytest.raises(RuntimeError, match="nested"),
                nk.reuse_features(model if inner == "model" else model.first),
            ):
                pass
            accumulate(model, batches[2:])
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    def test_a_model_with_nothing_to_reuse(self):
        for model in (nn.Linear(3, 3), nn.Sequential()):
            with pytest.raises(ValueError, match="FusedNeatLinear layers, got none"), nk.reuse_features(model):
                pass

    def test_a_merged_model(self):
        model = make()
        model.first.merge()
        model.second.merge()
        with pytest.raises(ValueError, match="unmerged"), nk.reuse_features(model):
            pass

    def test_inference_mode(self):
        model = make()
        with torch.inference_mode(), pytest.raises(RuntimeError, match="training"), nk.reuse_features(model):
            pass
        assert model.first._reused is None

    def test_an_exception_drops_everything(self, batches):
        model = make()
        with pytest.raises(KeyError), nk.reuse_features(model):
            accumulate(model, batches[:1])
            raise KeyError("from the user's loop")
        assert model.first._reused is model.second._reused is None
        assert model.first.neat_A.grad is None
        model.zero_grad()
        expected = plain_gradients(model, batches)
        with nk.reuse_features(model):
            accumulate(model, batches)
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])

    def test_a_layer_that_cannot_compute_its_features_leaves_no_block_open(self):
        model = make()
        model.second.activation = "nonsense"
        with pytest.raises(ValueError, match="activation"), nk.reuse_features(model):
            pass
        assert model.first._reused is model.second._reused is None

    def test_a_block_ended_without_gradients_enabled(self, batches):
        model = make()
        expected = plain_gradients(model, batches)
        with torch.no_grad(), nk.reuse_features(model), torch.enable_grad():
            accumulate(model, batches)
        for name, g in gradients(model).items():
            torch.testing.assert_close(g, expected[name])
