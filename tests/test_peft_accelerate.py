"""accelerate(): PEFT's PEANuT and LoRA layers on the fused path give what PEFT's own classes give."""

import copy
import pickle

import peft
import pytest
import torch
from counting import CountOps, InsideOps
from masks import assert_masks_follow_the_seed
from models import CASES, make_case
from peft import LoraConfig, PeanutConfig, get_peft_model
from peft.tuners.lora.layer import Linear as StockLora
from peft.tuners.peanut.layer import Linear as StockPeanut
from torch import nn
from torch.utils._pytree import tree_leaves

from neat_kernels.integrations.peft import accelerate
from neat_kernels.integrations.peft.lora import FusedLoraLinear
from neat_kernels.integrations.peft.peanut import FusedPeanutLinear

SMOOTH = ["gelu", "gelu_new", "silu", "tanh", "linear"]
# Layers of nn.Linear, the only ones that stock PEANuT takes.
LINEARS = {"gpt2": ["lm_head"]}


class Block(nn.Module):
    def __init__(self, width=24, hidden=40):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def peanut_model(name="llama", **options):
    model, batch = make_case(name)
    targets = LINEARS.get(name, CASES[name].target_modules)
    options = {"r": 4, "depth": 1, "act_fn": "gelu", "scaling": 0.7, "init_weights": False, **options}
    return get_peft_model(model, PeanutConfig(target_modules=targets, **options)), batch


def peanut_block(depth=1, dtype=torch.float32, act_fn="silu", **options):
    config = PeanutConfig(r=4, depth=depth, act_fn=act_fn, target_modules=["up", "down"], init_weights=False, **options)
    return get_peft_model(Block().to(dtype), config)


def step(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def block_step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), gradients(model)


def assert_close(got, wanted, bound):
    (y, grads), (y_wanted, grads_wanted) = got, wanted
    assert (y - y_wanted).abs().max() <= bound * y_wanted.abs().max()
    assert grads.keys() == grads_wanted.keys()
    assert grads
    for name, grad in grads.items():
        assert (grad - grads_wanted[name]).norm() <= bound * grads_wanted[name].norm(), name


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("act_fn", [*SMOOTH, "relu"])
@pytest.mark.parametrize("name", ["llama", "vit", "roberta", "gpt2"])
def test_gives_the_logits_and_gradients_of_stock_peanut(name, act_fn, depth):
    model, batch = peanut_model(name, depth=depth, act_fn=act_fn)
    stock = step(model, batch)
    report = accelerate(model)
    assert not report.unchanged
    assert_close(step(model, batch), stock, 1e-3 if act_fn == "relu" else 1e-5)


@pytest.mark.parametrize("depth", [0, 2])
def test_gives_them_in_float64_where_float32_is_ill_conditioned(depth):
    # The features of a sigmoid are all near one half: in float32, stock and fused gradients are off by up to 1 % alike.
    model, batch = peanut_model("vit", depth=depth, act_fn="sigmoid")
    model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    stock = step(model, batch)
    accelerate(model)
    assert_close(step(model, batch), stock, 1e-11)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["llama", "roberta", "gpt2", "whisper"])
def test_gives_the_logits_and_gradients_of_stock_lora(name, bias):
    model, batch = make_case(name)
    config = LoraConfig(r=4, target_modules=CASES[name].target_modules, bias="lora_only" if bias else "none")
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    stock = step(model, batch)
    report = accelerate(model)
    assert {type(model.get_submodule(name)) for name in report.changed} == {FusedLoraLinear}
    assert_close(step(model, batch), stock, 1e-5)


class LargestMade(InsideOps):
    """The number of elements of the largest tensor that an operator makes."""

    elements = 0

    def operator(self, func, args, kwargs):
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.numel())
        return out


def test_makes_no_matrix_of_the_size_of_a_weight():
    model = get_peft_model(Block(96, 160), PeanutConfig(r=4, depth=1, act_fn="silu", target_modules=["up", "down"]))
    x = torch.randn(7, 96)

    def largest():
        with LargestMade() as made:
            block_step(model, x)
        return made.elements

    assert largest() >= 96 * 160
    accelerate(model)
    assert largest() <= 160 * max(7, 4)


def test_several_adapters_active_sets_and_adapters_added_after_the_call():
    model = peanut_block()
    accelerate(model)
    model.add_adapter("other", PeanutConfig(r=3, depth=0, act_fn="tanh", target_modules=["up"], init_weights=False))
    stock = copy.deepcopy(model)
    accelerate(stock, undo=True)
    x = torch.randn(5, 24)
    for active in (["default"], ["other"], ["default", "other"]):
        for m in (model, stock):
            m.base_model.set_adapter(active)
        assert_close(block_step(model, x), block_step(stock, x), 1e-5)
    for m in (model, stock):
        m.delete_adapter("default")
    assert model.base_model.model.up.active_adapters == stock.base_model.model.up.active_adapters
    assert_close(block_step(model, x), block_step(stock, x), 1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model.down.base_layer(torch.tanh(model.base_model.model.up(x))))


def test_layers_made_later_are_stock_until_the_next_call():
    model = peanut_block()
    accelerate(model)
    model.base_model.model.extra = nn.Linear(4, 4).requires_grad_(False)
    model.add_adapter("other", PeanutConfig(r=3, target_modules=["extra"]))
    assert type(model.base_model.model.extra) is StockPeanut
    report = accelerate(model)
    assert type(model.base_model.model.extra) is FusedPeanutLinear
    assert "until the next call" in str(report)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_and_unmerges_as_before(safe_merge):
    model = peanut_block()
    model.add_adapter("other", PeanutConfig(r=3, depth=0, act_fn="tanh", target_modules=["up"], init_weights=False))
    x, stock = torch.randn(5, 24), copy.deepcopy(model)
    accelerate(model)
    for m in (model, stock):
        m.merge_adapter(["default"], safe_merge=safe_merge)
        m.merge_adapter(["other"], safe_merge=safe_merge)
    assert model.base_model.model.up.merged_adapters == ["default", "other"]
    assert torch.equal(model(x), stock(x))
    for m in (model, stock):
        m.unmerge_adapter()
    assert torch.equal(model.base_model.model.up.base_layer.weight, stock.base_model.model.up.base_layer.weight)
    merged, stock = (
        m.merge_and_unload(safe_merge=safe_merge, adapter_names=["default", "other"]) for m in (model, stock)
    )
    assert torch.equal(merged(x), stock(x))
    assert type(merged.up) is nn.Linear


def test_a_merge_of_nan_is_refused_and_changes_nothing():
    model = peanut_block()
    accelerate(model)
    up = model.base_model.model.up
    with torch.no_grad():
        up.peanut_B["default"].weight[0, 0] = float("nan")
    weight = up.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        up.merge(safe_merge=True)
    assert torch.equal(up.base_layer.weight, weight)


def test_files_and_state_dicts_are_pefts_own(tmp_path):
    model, batch = peanut_model("llama")
    stock_state = model.state_dict()
    model.save_pretrained(tmp_path / "stock")
    accelerate(model)
    assert model.state_dict().keys() == stock_state.keys()
    model.save_pretrained(tmp_path / "fused")
    stock_file, fused_file = (tmp_path / kind / "adapter_model.safetensors" for kind in ("stock", "fused"))
    assert stock_file.read_bytes() == fused_file.read_bytes()
    loaded = peft.PeftModel.from_pretrained(make_case("llama")[0], tmp_path / "fused", is_trainable=True)
    assert_close(step(model, batch), step(loaded, batch), 1e-5)


def test_survives_deepcopy_and_pickling_and_is_undone(tmp_path):
    model = peanut_block()
    x = torch.randn(5, 24)
    stock = block_step(model, x)
    names = set(vars(model.base_model.model.up))
    accelerate(model)
    model.eval()
    with torch.no_grad():
        model(x)  # fills the cache, which must not be shared with a copy
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.base_model.model.up) is FusedPeanutLinear
        assert_close(block_step(copied, x), stock, 1e-5)
        with torch.no_grad():
            copied.base_model.model.up.peanut_B["default"].weight.zero_()
            assert not torch.equal(copied(x), model(x))
    report = accelerate(model, undo=True)
    up = model.base_model.model.up
    assert type(up) is StockPeanut
    assert len(report.changed) == 2
    assert set(vars(up)) == names
    assert not up._load_state_dict_post_hooks
    assert_close(block_step(model, x), stock, 0.0)


def test_touches_no_class_of_pefts():
    before = dict(vars(StockPeanut)), dict(vars(StockLora))
    other = peanut_block()
    accelerate(peanut_block())
    assert (dict(vars(StockPeanut)), dict(vars(StockLora))) == before
    assert type(other.base_model.model.up) is StockPeanut


def test_a_second_call_changes_the_settings():
    model = peanut_block(dtype=torch.bfloat16)
    accelerate(model)
    assert "backend=torch" in model.base_model.model.up.explain(torch.randn(2, 24, dtype=torch.bfloat16))
    assert len(accelerate(model, compute_dtype=torch.float32).changed) == 2
    assert model.base_model.model.up._neat_settings.compute_dtype == torch.float32


class Cached:
    """A model in eval mode whose features are cached, and what it gives."""

    def __init__(self):
        self.model = peanut_block()
        accelerate(self.model)
        self.model.eval()
        self.x = torch.randn(5, 24)
        self.up = self.model.base_model.model.up

    def __call__(self):
        with torch.no_grad():
            return self.model(self.x)


def test_features_are_cached_without_gradients_and_never_stale():
    cached = Cached()
    first = cached()
    with CountOps() as ops:
        assert torch.equal(cached(), first)
    assert not ops.features
    with torch.no_grad():
        cached.up.peanut_A["default"].weight.mul_(2)
    with CountOps() as ops:
        assert not torch.equal(cached(), first)
    assert ops.features == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.model.load_state_dict({k: 2 * v for k, v in c.model.state_dict().items()}),
        lambda c: c.model.load_state_dict({k: 2 * v for k, v in c.model.state_dict().items()}, assign=True),
        lambda c: (c.up.base_layer.weight.data.copy_(2 * c.up.base_layer.weight), c.up.invalidate()),
        lambda c: c.up.scaling.update(default=3.0),
        lambda c: c.model.train(),
        lambda c: c.model.double().float(),
        lambda c: c.model.merge_adapter(),
    ],
)
def test_the_cache_holds_no_longer_than_what_it_was_made_of(change):
    cached = Cached()
    cached()
    change(cached)
    fresh = copy.deepcopy(cached.model)
    accelerate(fresh, undo=True)
    got, wanted = cached(), fresh(cached.x)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_training_drops_what_is_cached():
    cached = Cached()
    cached()
    assert cached.up._neat_cache.factors is not None
    cached.model.train()
    assert cached.up._neat_cache.factors is None


def test_active_adapters_have_caches_of_their_own():
    cached = Cached()
    cached.model.add_adapter("other", PeanutConfig(r=3, target_modules=["up"], init_weights=False))
    by_name = {}
    for name in ("default", "other", "default"):
        cached.model.set_adapter(name)
        by_name.setdefault(name, cached())
        assert torch.equal(cached(), by_name[name])
    assert not torch.equal(by_name["default"], by_name["other"])


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_half_models_are_as_close_to_float64_as_stock(compute_dtype):
    model = peanut_block(dtype=torch.bfloat16)
    x = torch.randn(33, 24).bfloat16()
    exact = copy.deepcopy(model).double()
    y_exact, grads_exact = block_step(exact, x.double())
    stock = block_step(model, x)
    accelerate(model, compute_dtype=compute_dtype)
    fused = block_step(model, x)

    def error(step):
        y, grads = step
        return torch.tensor(
            [(y - y_exact).norm() / y_exact.norm()]
            + [(grads[name] - wanted).norm() / wanted.norm() for name, wanted in grads_exact.items()]
        )

    # Over a bf16 layer of PEFT the branch is fp32 by default, ours bf16; its rounding is one more of the same size.
    assert (error(fused) <= (1.0 if compute_dtype else 2.0) * error(stock) + 2.0**-9).all()


def test_autocast_gives_the_dtype_of_the_base():
    model = peanut_block()
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        stock = block_step(model, x)
        accelerate(model)
        fused = block_step(model, x)
    assert fused[0].dtype == stock[0].dtype == torch.bfloat16
    assert_close(fused, stock, 2.0**-6)


def test_what_hangs_on_the_base_layer_still_runs():
    model = peanut_block()
    x, seen = torch.randn(5, 24), []
    model.base_model.model.up.base_layer.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    stock = block_step(model, x)
    accelerate(model)
    assert "hooks hang on it" in model.base_model.model.up.explain(x)
    assert_close(block_step(model, x), stock, 1e-5)
    assert len(seen) == 2


def test_what_hangs_on_a_part_of_the_adapter_keeps_pefts_forward():
    model = peanut_block()
    x, seen = torch.randn(5, 24), []
    accelerate(model)
    model.base_model.model.up.peanut_encoders["default"][0].register_forward_hook(lambda *args: seen.append(1))
    assert "PEFT's own forward" in model.base_model.model.up.explain(x)
    model(x)
    assert seen


def test_the_report_names_what_is_not_fused_and_why():
    model = get_peft_model(Block(), PeanutConfig(r=4, act_fn="mish", target_modules=["up"]))
    with pytest.raises(ValueError, match="act_fn 'mish' is none of"):
        accelerate(model)
    assert type(model.base_model.model.up) is StockPeanut
    model.add_adapter("gelu", PeanutConfig(r=4, act_fn="gelu", target_modules=["up"]))
    assert accelerate(model).changed == ("base_model.model.up",)
    assert "PEFT's own forward: adapter 'default': act_fn 'mish'" in model.base_model.model.up.explain(
        torch.randn(2, 24)
    )


def test_a_variant_of_lora_stays_pefts():
    model = get_peft_model(Block(), LoraConfig(r=4, target_modules=["up"], use_dora=True))
    with pytest.raises(ValueError, match="it is the variant DoraLinearVariant"):
        accelerate(model)
    mixed = get_peft_model(Block(), LoraConfig(r=4, target_modules=["up"]))
    mixed.base_model.model.emb = nn.Embedding(4, 4)
    mixed.add_adapter("other", LoraConfig(r=2, target_modules=["emb"]))
    report = accelerate(mixed)
    assert list(report.unchanged) == ["base_model.model.emb"]
    assert "lora.layer.Embedding is neither" in report.unchanged["base_model.model.emb"]


def test_mixed_batches_of_lora_run_pefts_own_forward():
    model = get_peft_model(Block(), LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.eval()
    x = torch.randn(4, 24)
    names = ["default", "other", "__base__", "default"]
    stock = model(x, adapter_names=names)
    accelerate(model)
    assert torch.equal(model(x, adapter_names=names), stock)


def test_lora_dropout_is_on_in_training_alone():
    model = get_peft_model(Block(), LoraConfig(r=4, target_modules=["up"], lora_dropout=0.5, init_lora_weights=False))
    accelerate(model)
    x = torch.randn(64, 24)
    assert_masks_follow_the_seed(lambda: model(x))
    model.eval()
    stock = copy.deepcopy(model)
    accelerate(stock, undo=True)
    assert (model(x) - stock(x)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compute_dtype": torch.float16}, "must be None or torch.float32"),
        ({"compute_dtype": torch.int8}, "compute_dtype must be None or one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_refuses_bad_options_and_changes_nothing(options, match):
    model = peanut_block()
    with pytest.raises(ValueError, match=match):
        accelerate(model, **options)
    assert type(model.base_model.model.up) is StockPeanut


def test_refuses_a_model_without_layers_of_peft_and_what_is_no_model():
    with pytest.raises(ValueError, match="no layer of PEFT in Block"):
        accelerate(Block())
    with pytest.raises(TypeError, match="got dict"):
        accelerate({})


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    from neat_kernels import BackendUnavailableError
    from neat_kernels.plan import device_obstacle

    if device_obstacle(torch.device("cpu")) is None:
        pytest.skip("Triton interprets in this process")
    model = peanut_block()
    with pytest.raises(BackendUnavailableError):
        accelerate(model, backend="triton")
    assert type(model.base_model.model.up) is StockPeanut
