"""apply_neat, remove_neat and the matching of names: what is adapted, what is refused, what a refusal leaves alone."""

import ast
import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import neat_kernels as nk


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x) + sum(expert(x) for expert in self.experts)


class Decoder(nn.Module):
    """A small model with an output head, repeated blocks, experts and a layer that nothing should touch."""

    def __init__(self, width=8, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 11, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Classifier(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.add_module(head, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


def adapted(model):
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nk.FusedNeatLinear)]


def config(target_modules, **options):
    return nk.NeatConfig(target_modules=target_modules, **{"r": 2, **options})


class State:
    """Everything of a model that a refusal must leave alone."""

    def __init__(self, model):
        self.modules = [(name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False)]
        self.parameters = [
            (name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters(remove_duplicate=False)
        ]
        self.training = [m.training for m in model.modules()]
        self.values = {k: v.clone() for k, v in model.state_dict().items() if v.device.type != "meta"}
        self.attributes = [sorted(vars(m)) for m in model.modules()]

    def __eq__(self, other):
        return (
            (self.modules, self.parameters, self.training, self.attributes)
            == (other.modules, other.parameters, other.training, other.attributes)
            and self.values.keys() == other.values.keys()
            and all(torch.equal(self.values[k], other.values[k]) for k in self.values)
        )


def refused(model, target_modules, error, match, **options):
    before = State(model)
    with pytest.raises(error, match=match) as caught:
        nk.apply_neat(model, config(target_modules, **options))
    assert State(model) == before
    return str(caught.value)


LAYERS = range(3)
MATCHES = {
    "suffix": (["q_proj"], {}, [f"layers.{i}.attn.q_proj" for i in LAYERS]),
    "two suffixes": (
        ["q_proj", "mlp.2"],
        {},
        [n for i in LAYERS for n in (f"layers.{i}.attn.q_proj", f"layers.{i}.mlp.2")],
    ),
    "a whole name": (["layers.1.attn.k_proj"], {}, ["layers.1.attn.k_proj"]),
    "a tuple": (("q_proj",), {"layers_to_transform": 0}, ["layers.0.attn.q_proj"]),
    "a set": ({"q_proj"}, {"layers_to_transform": 0}, ["layers.0.attn.q_proj"]),
    "a suffix is no substring": (["lm_head"], {}, ["lm_head"]),
    "regex": (r".*\.[01]\.attn\.[qv]_proj", {}, [f"layers.{i}.attn.{p}_proj" for i in (0, 1) for p in "qv"]),
    "the regex must match the whole name": (
        r"layers\.\d\.attn\.o_proj",
        {},
        [f"layers.{i}.attn.o_proj" for i in LAYERS],
    ),
    "all-linear in any case": (
        "All-Linear",
        {"exclude_modules": ["o_proj", "k_proj", "v_proj", "experts.0", "experts.1", "mlp.0"]},
        [n for i in LAYERS for n in (f"layers.{i}.attn.q_proj", f"layers.{i}.mlp.2")],
    ),
    "exclude regex": (
        ["q_proj", "k_proj"],
        {"exclude_modules": r".*\.[12]\..*"},
        ["layers.0.attn.q_proj", "layers.0.attn.k_proj"],
    ),
    "exclude by whole name": (
        ["q_proj"],
        {"exclude_modules": ["layers.1.attn.q_proj"]},
        ["layers.0.attn.q_proj", "layers.2.attn.q_proj"],
    ),
    "one layer": (["q_proj"], {"layers_to_transform": 1}, ["layers.1.attn.q_proj"]),
    "several layers": (["q_proj"], {"layers_to_transform": [0, 2]}, ["layers.0.attn.q_proj", "layers.2.attn.q_proj"]),
    "layers of all-linear": (
        "all-linear",
        {"layers_to_transform": [1], "exclude_modules": ["o_proj", "mlp.0", "mlp.2", "experts.0", "experts.1"]},
        [f"layers.1.attn.{p}_proj" for p in "qkv"],
    ),
    "the first number counts": (["experts.0"], {"layers_to_transform": [2]}, ["layers.2.experts.0"]),
    "a named list": (["experts.0"], {"layers_to_transform": [2], "layers_pattern": "layers"}, ["layers.2.experts.0"]),
    "modules_to_save are not adapted": (
        ["q_proj", "lm_head"],
        {"modules_to_save": ["lm_head", "layers.0"]},
        ["layers.1.attn.q_proj", "layers.2.attn.q_proj"],
    ),
}  # fmt: skip


class TestMatching:
    @pytest.mark.parametrize("case", MATCHES)
    def test_names(self, case):
        target_modules, options, expected = MATCHES[case]
        model = nk.apply_neat(Decoder(), config(target_modules, **options))
        assert adapted(model) == sorted(expected, key=adapted(model).index) == adapted(model)

    def test_all_linear_leaves_out_the_output_head_alone(self):
        model = nk.apply_neat(Decoder(), config("all-linear"))
        linear = [name for name, m in Decoder().named_modules() if isinstance(m, nn.Linear)]
        assert adapted(model) == [name for name in linear if name != "lm_head"]

    @pytest.mark.parametrize("head", ["score", "classifier"])
    def test_all_linear_leaves_out_a_classifier(self, head):
        assert adapted(nk.apply_neat(Classifier(head), config("all-linear"))) == ["body"]

    @pytest.mark.parametrize(
        ("pattern", "ranks"),
        [
            ({"q_proj": 5}, {"q_proj": 5, "v_proj": 2}),
            ({r"layers\.1\.attn\.q_proj": 5}, {"layers.1.attn.q_proj": 5, "layers.0.attn.q_proj": 2}),
            ({r"layers\.[01]\..*": 5, "q_proj": 7}, {"layers.0.attn.q_proj": 5, "layers.2.attn.q_proj": 7}),
            ({"q_proj|v_proj": 1}, {"q_proj": 1, "v_proj": 1}),
            ({r"attn\.q_proj": 3}, {"q_proj": 3, "v_proj": 2}),
        ],
        ids=str,
    )
    def test_rank_pattern(self, pattern, ranks):
        model = nk.apply_neat(Decoder(), config(["q_proj", "v_proj"], rank_pattern=pattern))
        for suffix, r in ranks.items():
            found = {model.get_submodule(name).r for name in adapted(model) if name.endswith(suffix)}
            assert found == {r}

    def test_options_reach_the_layers(self):
        options = {"orientation": "in", "depth": 1, "activation": "gelu", "scaling": 0.5, "dropout": 0.25}
        options |= {"compute_dtype": torch.float32, "backend": "torch"}
        model = nk.apply_neat(Decoder(), config(["q_proj"], **options))
        layer = model.layers[0].attn.q_proj
        assert {name: getattr(layer, name) for name in options} == options
        assert len(layer.neat_encoders) == len(layer.neat_decoders) == 1

    def test_a_conv1d_is_matched(self):
        model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 2))
        assert adapted(nk.apply_neat(model, config("all-linear"))) == ["0", "1"]
        assert model[0].transposed


class TestApply:
    @pytest.mark.parametrize("depth", [0, 1])
    def test_only_the_adapters_train(self, depth):
        model = Decoder()
        parameters = dict(model.named_parameters())
        assert nk.apply_neat(model, config(["q_proj"], depth=depth)) is model
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if ".neat_" in n
        }
        after = dict(model.named_parameters())
        assert all(after[name] is p for name, p in parameters.items())
        assert not model.layers[0].norm.weight.requires_grad

    def test_the_model_computes_what_it_did(self):
        model, tokens = Decoder(), torch.randint(0, 11, (2, 5))
        expected = model(tokens)
        assert torch.equal(nk.apply_neat(model, config("all-linear"))(tokens), expected)

    def test_a_base_checkpoint_still_loads(self):
        model, base = nk.apply_neat(Decoder(), config("all-linear")), Decoder()
        result = model.load_state_dict(base.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all(".neat_" in key for key in result.missing_keys)
        tokens = torch.randint(0, 11, (2, 5))
        assert torch.equal(model(tokens), base(tokens))

    def test_modules_to_save_train_whole(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"], modules_to_save=["lm_head", "norm"]))
        trained = {n for n, p in model.named_parameters() if p.requires_grad and ".neat_" not in n}
        assert trained == {"lm_head.weight", *(f"layers.{i}.norm.{p}" for i in LAYERS for p in ("weight", "bias"))}

    @pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b"], "all-linear"], ids=str)
    def test_a_module_under_two_names_stays_one_module(self, names):
        model = nn.Module()
        model.a = nn.Linear(4, 4)
        model.b = model.a
        original = model.a
        nk.apply_neat(model, config(names))
        assert model.a is model.b
        assert isinstance(model.a, nk.FusedNeatLinear)
        nk.remove_neat(model)
        assert model.a is model.b is original

    def test_excluding_one_name_of_a_module_leaves_it_alone_under_both(self):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        model["b"] = model["a"]
        nk.apply_neat(model, config(["a", "c"], exclude_modules=["b"]))
        assert adapted(model) == ["c"]

    def test_mixed_training_modes_stay(self):
        model = Decoder().train()
        model.layers[0].eval()
        before = {n: m.training for n, m in model.named_modules()}
        nk.apply_neat(model, config("all-linear"))
        assert {n: m.training for n, m in model.named_modules() if n in before} == before

    def test_a_second_configuration_adds_to_the_first(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"], modules_to_save=["embed"]))
        nk.apply_neat(model, config(["v_proj"], r=3, modules_to_save=["norm"]))
        untrained = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert not {n for n in untrained if ".neat_" in n}
        assert not {n for n in untrained if "norm" in n}
        assert "embed.weight" not in untrained
        nk.remove_neat(model)
        assert not adapted(model)
        assert all(p.requires_grad for p in model.parameters())

    def test_the_same_layer_class_inside_is_not_searched_for_targets(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"], depth=1))
        refused(model, ["neat_encoders"], ValueError, "matched no layer")


class TestHooks:
    def test_hooks_of_a_layer_stay_with_it(self):
        model, calls = nn.Sequential(nn.Linear(4, 4)), []
        linear = model[0]
        handles = [
            linear.register_forward_pre_hook(lambda m, args: calls.append("pre")),
            linear.register_forward_pre_hook(lambda m, args, kw: calls.append("pre kwargs"), with_kwargs=True),
            linear.register_forward_hook(lambda m, args, y: calls.append("forward")),
            linear.register_forward_hook(lambda m, args, y: calls.append("always"), always_call=True),
            linear.register_full_backward_pre_hook(lambda m, g: calls.append("backward pre")),
            linear.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
        ]
        x = torch.randn(2, 4, requires_grad=True)
        model(x).sum().backward()
        expected, calls[:] = list(calls), []
        assert len(expected) == 6
        nk.apply_neat(model, config(["0"]))
        model(x).sum().backward()
        assert calls == expected
        for handle in handles:
            handle.remove()
        calls.clear()
        model(x).sum().backward()
        nk.remove_neat(model)
        model(x).sum().backward()
        assert calls == []

    @pytest.mark.parametrize("finish", [nk.remove_neat, nk.merge_neat])
    def test_hooks_set_while_adapted_stay_afterwards(self, finish):
        model, calls = nn.Sequential(nn.Linear(4, 4)), []
        nk.apply_neat(model, config(["0"]))
        handles = [
            model[0].register_forward_hook(lambda m, args, y: calls.append("forward")),
            model[0].register_full_backward_hook(lambda m, gi, go: calls.append(("backward", len(gi), len(go)))),
        ]
        x = torch.randn(2, 4, requires_grad=True)
        model(x).sum().backward()
        expected, calls[:] = list(calls), []
        finish(model)
        model(x).sum().backward()
        assert calls == expected == ["forward", ("backward", 1, 1)]
        for handle in handles:
            handle.remove()
        model(x).sum().backward()
        assert calls == expected

    def test_a_hook_that_changes_the_output(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].register_forward_hook(lambda m, args, y: y + 1)
        x = torch.randn(2, 4)
        expected = model(x)
        assert torch.equal(nk.apply_neat(model, config(["0"]))(x), expected)

    def test_a_deepcopied_model_has_hooks_of_its_own(self):
        model, calls = nn.Sequential(nn.Linear(4, 4)), []
        handle = model[0].register_forward_hook(lambda m, args, y: calls.append(m))
        copied = copy.deepcopy(nk.apply_neat(model, config(["0"])))
        handle.remove()
        copied(torch.randn(2, 4))
        assert calls == [copied[0]]
        nk.remove_neat(copied)(torch.randn(2, 4))
        assert calls[-1] is copied[0]


class TestRemove:
    @pytest.mark.parametrize("merged", [False, True])
    def test_the_same_modules_parameters_and_flags_are_back(self, merged):
        model = Decoder()
        model.embed.requires_grad_(False)
        model.layers[0].attn.q_proj.weight.requires_grad_(False)
        before = State(model)
        nk.apply_neat(model, config("all-linear", modules_to_save=["norm"]))
        for layer in (m for m in model.modules() if isinstance(m, nk.FusedNeatLinear)):
            nn.init.normal_(layer.neat_B)
            if merged:
                layer.merge()
        assert State(model) != before
        assert nk.remove_neat(model) is model
        assert State(model) == before

    def test_a_conv1d_comes_back(self):
        model = nn.Sequential(Conv1D(6, 4))
        before = State(model)
        nk.apply_neat(model, config(["0"], depth=1))
        nk.remove_neat(model)
        assert State(model) == before

    def test_the_training_mode_of_the_moment_is_kept(self):
        model = nk.apply_neat(Decoder().train(), config(["q_proj"])).eval()
        nk.remove_neat(model)
        assert not any(m.training for m in model.modules())

    def test_what_was_loaded_meanwhile_is_kept(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"]))
        other = nk.apply_neat(Decoder(), config(["q_proj"]))
        for assign in (False, True):
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        nk.remove_neat(model)
        assert torch.equal(model.layers[0].attn.q_proj.weight, other.layers[0].attn.q_proj.weight)

    def test_a_move_meanwhile_is_kept(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"])).double()
        nk.remove_neat(model)
        assert {p.dtype for p in model.parameters()} == {torch.float64}

    def test_applying_again_after_removing(self):
        model, before = Decoder(), None
        for _ in range(2):
            before = before or State(model)
            nk.apply_neat(model, config(["q_proj"]))
            assert len(adapted(model)) == 3
            nk.remove_neat(model)
            assert State(model) == before

    def test_a_model_without_adapters(self):
        for call in (nk.remove_neat, nk.merge_neat):
            with pytest.raises(ValueError, match="expected a model with Neat layers inside, got none"):
                call(Decoder())

    def test_a_part_of_the_model(self):
        model = Decoder()
        before = State(model.layers[0])
        nk.apply_neat(model, config(["q_proj"]))
        nk.remove_neat(model.layers[0])
        assert adapted(model) == [f"layers.{i}.attn.q_proj" for i in (1, 2)]
        nk.remove_neat(model)
        assert State(model.layers[0]) == before


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_weight(weight):
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def with_instance_forward():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def with_buffer(name):
    linear = nn.Linear(4, 4, bias=name != "bias")
    linear.__dict__.pop(name, None)
    linear._parameters.pop(name, None)
    linear.register_buffer(name, torch.zeros(4))
    return linear


UNADAPTABLE = {
    "a bias that is not trained": (lambda: with_buffer("bias"), ValueError, "plain nn.Parameter or None, got Tensor"),
    "a buffer of its own": (lambda: with_buffer("scale"), ValueError, "weight and a bias alone, got 'scale' in it too"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), ValueError, "parametrized"),
    "old weight_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), ValueError, "plain 2-D nn.Parameter, got"),
    "int8": (lambda: with_weight(torch.ones(4, 4, dtype=torch.int8)), ValueError, "float32.*got torch.int8"),
    "float8": (lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)), ValueError, "got torch.float8"),
    "complex": (lambda: with_weight(torch.ones(4, 4, dtype=torch.complex64)), ValueError, "got torch.complex64"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), ValueError, "meta device"),
    "lazy": (lambda: nn.LazyLinear(4), ValueError, "expected"),
    "a forward of its own": (lambda: OwnForward(4, 4), TypeError, "OwnForward has a forward of its own"),
    "a replaced forward": (with_instance_forward, TypeError, "replaced on the instance"),
    "no linear layer": (lambda: nn.Conv2d(4, 4, 1), TypeError, "expected nn.Linear.*got Conv2d"),
    "an embedding": (lambda: nn.Embedding(4, 4), TypeError, "got Embedding"),
    "a container": (lambda: nn.Sequential(nn.Linear(4, 4)), TypeError, "got Sequential"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", UNADAPTABLE)
    def test_what_cannot_be_adapted(self, case):
        make, error, message = UNADAPTABLE[case]
        model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": make(), "frozen": nn.Linear(4, 4).requires_grad_(False)})
        modules, flags = list(model.modules()), [(n, p.requires_grad) for n, p in model.named_parameters()]
        with pytest.raises(error, match=f"bad cannot be adapted.*{message}"):
            nk.apply_neat(model, config(["good", "bad"]))
        assert list(model.modules()) == modules
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: nn.MultiheadAttention(8, 2), "out_proj"),
            (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
            (lambda: nn.TransformerEncoderLayer(8, 2, 16), "out_proj"),
        ],
        ids=["attention", "encoder linear1", "encoder out_proj"],
    )
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("how", ["name", "all-linear"])
    def test_weights_that_are_read_without_a_call(self, how, nested, make, name):
        model = nn.ModuleDict({"block": make(), "head": nn.Linear(8, 2)}) if nested else make()
        refused(model, [name] if how == "name" else "all-linear", ValueError, "reads its weight without calling it")

    def test_the_projection_of_an_attention_under_a_second_name(self):
        model = nn.Module()
        model.alias = nn.Linear(8, 8)
        model.attention = nn.MultiheadAttention(8, 2)
        model.alias = model.attention.out_proj
        for names in (["alias"], ["out_proj"], ["alias", "out_proj"], "all-linear"):
            refused(model, names, ValueError, "reads its weight without calling it")

    @pytest.mark.parametrize("again", [["q_proj"], "all-linear", r".*q_proj", ["v_proj", "q_proj"]], ids=str)
    def test_adapted_twice(self, again):
        model = nk.apply_neat(Decoder(), config(["q_proj"]))
        refused(model, again, ValueError, "q_proj is adapted already")

    @pytest.mark.parametrize("merged", [False, True])
    def test_adapted_twice_when_merged(self, merged):
        model = nk.apply_neat(nn.Sequential(nn.Linear(4, 4)), config(["0"]))
        if merged:
            model[0].merge()
        refused(model, ["0"], ValueError, "0 is adapted already")

    def test_a_name_that_matches_nothing_lists_the_five_nearest(self):
        message = refused(Decoder(), ["q_porj"], ValueError, "'q_porj' matched no layer; nearest names")
        names = message.partition("nearest names: ")[2]
        assert names.count("'") == 10
        assert "q_proj" in names.partition(",")[0]
        linear = {name for name, m in Decoder().named_modules() if isinstance(m, nn.Linear)}
        assert set(ast.literal_eval(names)) <= linear

    UNMATCHED: ClassVar = {
        "one of several": ({"target_modules": ["q_proj", "query"]}, "'query' matched no layer"),
        "regex": ({"target_modules": r"layers\.9\..*"}, "matched no layer"),
        "a regex that matches a part": ({"target_modules": "q_proj"}, "matched no layer"),
        "everything excluded": (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            "matched no layer once exclude",
        ),
        "everything excluded of a set": (
            {"target_modules": {"q_proj"}, "exclude_modules": {"q_proj"}},
            "matched no layer once exclude",
        ),
        "exclude": ({"target_modules": ["q_proj"], "exclude_modules": ["quary"]}, "exclude_modules 'quary' matched no"),
        "exclude regex": ({"target_modules": ["q_proj"], "exclude_modules": "quary.*"}, "'quary.*' matched no module"),
        "rank_pattern": ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "rank_pattern.*v_proj.*none"),
        "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "'lm_haed' matched no"),
        "a layer index": ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "matched no layer"),
        "one of the layer indices": (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
            "layers_to_transform.*7",
        ),
        "no layer index": ({"target_modules": ["q_proj"], "layers_to_transform": []}, "matched no layer"),
        "layers_pattern": (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            "matched no layer",
        ),
        "one of the layers_patterns": (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
            "layers_pattern.*blocks",
        ),
    }

    @pytest.mark.parametrize("case", UNMATCHED)
    def test_an_entry_that_matches_nothing(self, case):
        options, message = self.UNMATCHED[case]
        refused(Decoder(), error=ValueError, match=message, **options)

    def test_a_model_that_is_a_linear_layer_itself(self):
        refused(nn.Linear(4, 4), ["weight"], ValueError, "matched no layer")

    def test_modules_to_save_that_share_an_adapted_weight(self):
        refused(
            Tied(), ["head"], ValueError, "shares its weight with the adapted layer 'head'", modules_to_save=["embed"]
        )

    def test_a_failure_half_way_changes_nothing(self, monkeypatch):
        model, made, make = Decoder(), [], nk.FusedNeatLinear.from_linear.__func__

        def failing(cls, linear, **options):
            if len(made) == 2:
                raise MemoryError("no room for the third layer")
            made.append(make(cls, linear, **options))
            return made[-1]

        monkeypatch.setattr(nk.FusedNeatLinear, "from_linear", classmethod(failing))
        refused(model, ["q_proj"], MemoryError, "third")

    def test_an_option_set_to_nonsense_later(self):
        model, later = Decoder(), config(["q_proj"])
        later.activation = "swish"
        before = State(model)
        with pytest.raises(ValueError, match="got 'swish'"):
            nk.apply_neat(model, later)
        assert State(model) == before


BAD_CONFIGS = {
    "no targets": ({"target_modules": None}, ValueError, "target_modules.*got None"),
    "empty targets": ({"target_modules": []}, ValueError, r"target_modules.*got \[\]"),
    "empty string": ({"target_modules": ""}, ValueError, "target_modules.*got ''"),
    "targets of numbers": ({"target_modules": [1]}, TypeError, "target_modules.*int"),
    "a bad regex": ({"target_modules": "[q_proj"}, ValueError, r"target_modules.*\[q_proj"),
    "a bad exclude regex": ({"exclude_modules": "[q_proj"}, ValueError, r"exclude_modules.*\[q_proj"),
    "a bad rank regex": ({"rank_pattern": {"[q_proj": 3}}, ValueError, r"rank_pattern.*\[q_proj"),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern.*at least 1, got 0"),
    "rank True": ({"rank_pattern": {"q_proj": True}}, TypeError, "rank_pattern.*int, got bool"),
    "modules_to_save string": ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save.*'lm_head'"),
    "pattern alone": ({"layers_pattern": "layers"}, ValueError, "layers_pattern needs layers_to_transform"),
    "layers with a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]}, ValueError, r"layers_to_transform.*\.\*q_proj"
    ),
    "negative layer": ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform must be at least 0, got -1"),
    "layer of a string": ({"layers_to_transform": ["1"]}, TypeError, "layers_to_transform must be an int, got str"),
}  # fmt: skip


class TestConfig:
    @pytest.mark.parametrize("case", BAD_CONFIGS)
    def test_refused(self, case):
        options, error, message = BAD_CONFIGS[case]
        with pytest.raises(error, match=message):
            nk.NeatConfig(**{"target_modules": ["q_proj"], **options})

    def test_it_takes_keywords_only(self):
        with pytest.raises(TypeError):
            nk.NeatConfig(16, ["q_proj"])

    def test_two_configs_share_no_rank_pattern(self):
        first, second = config(["a"]), config(["a"])
        first.rank_pattern["q"] = 3
        assert second.rank_pattern == {}


class TestSummary:
    def test_counts_and_rows(self):
        model = nk.apply_neat(Decoder(), config(["q_proj"], depth=1, modules_to_save=["lm_head"]))
        summary = nk.trainable_summary(model)
        per_layer = 2 * 8 * 2 + 2 * 2 * 2
        assert summary.trainable == 3 * per_layer + 8 * 11
        assert summary.total == sum(p.numel() for p in model.parameters())
        assert [row.name for row in summary.rows] == [*adapted(model), "lm_head"]
        assert [row.trainable for row in summary.rows] == [per_layer] * 3 + [88]
        assert [row.frozen for row in summary.rows] == [64] * 3 + [0]
        assert summary.fraction == summary.trainable / summary.total
        text = str(summary)
        assert f"{summary.trainable:,}" in text
        assert all(row.name in text and row.kind in text for row in summary.rows)

    def test_a_shared_parameter_counts_once(self):
        model = nk.apply_neat(Tied(), config(["body"], modules_to_save=["embed"]))
        summary = nk.trainable_summary(model)
        assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(row.trainable for row in summary.rows) == summary.trainable

    def test_a_model_without_parameters(self):
        summary = nk.trainable_summary(nn.ReLU())
        assert (summary.trainable, summary.total, summary.fraction, summary.rows) == (0, 0, 0.0, ())
        assert str(summary)

    def test_a_single_layer(self):
        summary = nk.trainable_summary(nk.FusedNeatLinear(4, 5, r=2))
        assert [row.trainable for row in summary.rows] == [5 * 2 * 2]
