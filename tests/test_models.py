"""The layer inside real architectures: tiny random Llama, GPT-2, RoBERTa and ViT."""

import copy

import pytest
import torch
from counting import CountOps
from models import BLOCKS, CASES, llama, make_case
from torch import nn

import neat_kernels as nk
from neat_kernels.vocabulary import ORIENTATIONS

R = 4


def neat_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nk.FusedNeatLinear)}


def adapt(model, target_modules="all-linear", **options):
    options = {"r": R, "activation": "gelu", **options}
    return nk.apply_neat(model, nk.NeatConfig(target_modules=target_modules, **options))


def wake(model, std=0.02):
    """Give every B values, since a zero B sends no gradient to A."""
    for layer in neat_layers(model).values():
        nn.init.normal_(layer.neat_B, std=std)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture(params=CASES)
def case(request):
    return request.param


class TestSwapped:
    def test_all_linear_means_every_layer_but_the_head(self, case):
        model, _ = make_case(case)
        adapt(model)
        assert len(neat_layers(model)) == CASES[case].layers
        heads = ("lm_head", "classifier", "score")
        assert not [name for name in neat_layers(model) if name.startswith(heads)]

    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    @pytest.mark.parametrize("training", [False, True])
    def test_an_exact_no_op_at_the_start(self, training, orientation, depth, case):
        model, batch = make_case(case)
        model.train(training)
        expected = logits(model, batch)
        adapt(model, orientation=orientation, depth=depth)
        assert torch.equal(logits(model, batch), expected)
        assert torch.equal(model(**batch).logits.detach(), expected)

    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_every_layer_receives_gradients_and_nothing_else_does(self, orientation, depth, case):
        model, batch = make_case(case)
        wake(adapt(model, CASES[case].target_modules, orientation=orientation, depth=depth))
        found = gradients(model, batch)
        adapters = {
            f"{name}.{p}"
            for name, layer in neat_layers(model).items()
            for p, _ in layer.named_parameters()
            if "neat" in p
        }
        assert found.keys() == adapters
        assert len(adapters) == (2 + 2 * depth) * len(neat_layers(model))
        for name, g in found.items():
            assert torch.isfinite(g).all(), name
            assert g.abs().sum() > 0, name

    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_gradients_are_those_of_the_written_out_update(self, orientation, case):
        model, batch = make_case(case)
        wake(adapt(model.double(), orientation=orientation, depth=1))
        batch = double(batch)
        ours = gradients(model, batch)
        for layer in neat_layers(model).values():
            layer.forward = lambda x, layer=layer: nk.reference.neat_linear(
                x,
                layer.weight.t() if layer.transposed else layer.weight,
                layer.neat_A,
                layer.neat_B,
                layer.bias,
                encoders=tuple(layer.neat_encoders),
                decoders=tuple(layer.neat_decoders),
                orientation=layer.orientation,
                activation=layer.activation,
            )
        for name, expected in gradients(model, batch).items():
            torch.testing.assert_close(ours[name], expected, msg=name)

    @pytest.mark.parametrize("depth", [0, 2])
    @pytest.mark.parametrize("orientation", ORIENTATIONS)
    def test_twenty_steps_lower_the_loss(self, orientation, depth, case):
        model, batch = make_case(case)
        adapt(model, orientation=orientation, depth=depth)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    def test_merge_unmerge_and_remove(self, case):
        model, batch = make_case(case)
        model, batch = model.double().eval(), double(batch)
        modules, base = dict(model.named_modules()), logits(model, batch)
        state = copy.deepcopy(model.state_dict())
        adapted = logits(wake(adapt(model, depth=1)), batch)
        assert not torch.equal(adapted, base)
        for layer in neat_layers(model).values():
            layer.merge()
        torch.testing.assert_close(logits(model, batch), adapted)
        for layer in neat_layers(model).values():
            layer.unmerge()
        assert torch.equal(logits(model, batch), adapted)
        nk.remove_neat(model)
        assert dict(model.named_modules()) == modules
        assert torch.equal(logits(model, batch), base)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_merge_neat_leaves_a_plain_model(self, case, tmp_path):
        model, batch = make_case(case)
        model, batch = model.double().eval(), double(batch)
        names = sorted(model.state_dict())
        adapted = logits(wake(adapt(model)), batch)
        nk.merge_neat(model)
        assert not neat_layers(model)
        assert sorted(model.state_dict()) == names
        merged = logits(model, batch)
        torch.testing.assert_close(merged, adapted)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert torch.equal(logits(loaded, batch), merged)

    def test_a_checkpoint_of_the_adapted_model_loads(self, case):
        model, batch = make_case(case)
        wake(adapt(model.eval(), depth=1))
        other = adapt(CASES[case].model().eval(), depth=1)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other, batch), logits(model, batch))
        base = CASES[case].model().eval()
        assert not other.load_state_dict(base.state_dict(), strict=False).unexpected_keys

    def test_summary(self, case):
        model, _ = make_case(case)
        total = sum(p.numel() for p in model.parameters())
        adapt(model)
        summary = nk.trainable_summary(model)
        added = sum(2 * R * layer.out_features for layer in neat_layers(model).values())
        assert (summary.trainable, summary.total) == (added, total + added)
        assert [row.name for row in summary.rows] == list(neat_layers(model))
        assert sum(row.trainable for row in summary.rows) == added

    def test_inference_caches_the_features_of_every_layer(self, case):
        model, batch = make_case(case)
        wake(adapt(model.eval()))
        uncached = model(**batch).logits.detach()
        for expected in (len(neat_layers(model)), 0):
            with CountOps() as ops, torch.inference_mode():
                y = model(**batch).logits
            assert ops.features == expected
            assert torch.equal(y, uncached)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing(self, use_reentrant, case):
        model, batch = make_case(case)
        wake(adapt(model.double(), depth=1))
        batch = double(batch)
        expected = gradients(model, batch)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        with CountOps() as ops:
            ours = gradients(model, batch)
        assert ops.calls["neat_linear"] > len(neat_layers(model)), "nothing was recomputed"
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], msg=name)

    def test_accumulation_with_reused_features(self, case):
        model, batch = make_case(case)
        wake(adapt(model.double()))
        batch = double(batch)
        model.zero_grad()
        for _ in range(2):
            model(**batch).loss.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with CountOps() as ops, nk.reuse_features(model):
            for _ in range(2):
                model(**batch).loss.backward()
        assert ops.features == ops.calls["features_backward"] == len(neat_layers(model))
        for name, g in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, g, msg=name)

    def test_bf16_model_with_fp32_adapters(self, case):
        model, batch = make_case(case)
        model = adapt(model.to(torch.bfloat16))
        batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
        wake(model)
        for name, g in gradients(model, batch).items():
            assert g.dtype == torch.float32, name
            assert torch.isfinite(g).all(), name
            assert g.abs().sum() > 0, name

    def test_autocast(self, case):
        model, batch = make_case(case)
        wake(adapt(model))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        for layer in neat_layers(model).values():
            assert layer.neat_A.grad.abs().sum() > 0
            assert layer.neat_A.grad.dtype == torch.float32


class TestLlama:
    def test_generation_with_a_cache_is_generation_without(self):
        model, batch = make_case("llama")
        wake(adapt(model.double().eval()), std=0.3)
        prompt = batch["input_ids"][:, :4]
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            cached = model.generate(prompt, **options)
            for layer in neat_layers(model).values():
                layer.merge()
            assert torch.equal(model.generate(prompt, **options), cached)
        nk.remove_neat(model)
        assert not torch.equal(model.generate(prompt, **options), cached)

    def test_an_adapted_head_tied_to_the_embedding_cannot_be_merged(self):
        model = llama(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        adapt(model, ["lm_head", "q_proj"])
        before = {name: (id(m), type(m)) for name, m in model.named_modules()}
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"embed_tokens is tied to lm_head.*expected a weight of its own"):
            nk.merge_neat(model)
        assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        nk.remove_neat(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_tied_model_adapted_elsewhere_merges(self):
        model = llama(tie_word_embeddings=True)
        adapt(model)
        nk.merge_neat(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_configuration_as_written_for_a_paper(self):
        model, batch = make_case("llama")
        adapt(
            model,
            ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            rank_pattern={r"layers\.0\.self_attn\.q_proj": 2 * R},
            exclude_modules=[f"layers.{BLOCKS - 1}.self_attn.k_proj"],
            layers_to_transform=[0, BLOCKS - 1],
            layers_pattern="layers",
            modules_to_save=["lm_head"],
        )
        ranks = {name: layer.r for name, layer in neat_layers(model).items()}
        assert len(ranks) == 5 * BLOCKS - 1
        assert ranks["model.layers.0.self_attn.q_proj"] == 2 * R
        assert model.lm_head.weight.requires_grad
        found = gradients(wake(model), batch)
        assert found["lm_head.weight"].abs().sum() > 0
        assert len(found) == 2 * len(ranks) + 1

    def test_from_pretrained_into_an_adapted_model_round_trips(self, tmp_path):
        model, batch = make_case("llama")
        model.eval().save_pretrained(tmp_path)
        loaded = adapt(type(model).from_pretrained(tmp_path).eval())
        assert torch.equal(logits(loaded, batch), logits(model, batch))
