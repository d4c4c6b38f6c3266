"""The plan of a small batch: one read of W each way, under the budget, the guard bands and the counts of the others."""

import pairwise
import pytest
import torch
from harness import DEVICE, DTYPES, check, draw, fused, use_multiprocessors, use_plan, use_seed
from test_bytes import M, N, R, accesses, tensors  # noqa: F401  (accesses is a fixture)
from test_guard_bands import assert_guarded, randn
from test_layouts import LAYOUTS, transposed

import neat_kernels as nk
from neat_kernels import plan
from neat_kernels.kernels import small_batch
from neat_kernels.torch_backend.low_rank import Branch
from neat_kernels.vocabulary import ACTIVATIONS, HALF_DTYPES, ORIENTATIONS

SHAPE = (29, 45, 70, 5)
ROWS = pairwise.rows(
    {
        "tokens": [1, 3, 16, 32],
        "matrix": [(1, 1), (1, 29), (37, 1), (64, 64), (97, 131), (29, 419), (419, 29)],
        "r": [1, 4, 8, 16, 33, 64],
        "dtype": DTYPES,
        "adapter_dtype": [None, torch.float32],
        "compute_dtype": [None, torch.float32],
        "orientation": ORIENTATIONS,
        "depth": [0, 1, 2],
        "activation": ACTIVATIONS,
        "bias": ["none", "frozen", "trained"],
        "scaling": [1.0, -0.37],
        "dropout": [0.0, 0.4],
        "multiprocessors": [0, 1000],
    }
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    use_plan(monkeypatch, "small")


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of this plan that ran."""
    seen = []
    for name in ("forward", "backward"):
        real = getattr(small_batch, name)
        monkeypatch.setattr(small_batch, name, lambda *args, name=name, real=real: (seen.append(name), real(*args))[1])
    return seen


@pytest.mark.parametrize("row", ROWS, ids=pairwise.name)
def test_every_pair_of_options(row, monkeypatch, calls):
    row = dict(row)
    tokens, matrix, bias, dropout = (row.pop(name) for name in ("tokens", "matrix", "bias", "dropout"))
    use_multiprocessors(monkeypatch, row.pop("multiprocessors"))
    if row["dtype"] not in HALF_DTYPES:
        # A wider branch is defined over half inputs alone.
        row.pop("compute_dtype")
    case = draw(tokens, *matrix, row.pop("r"), bias=bias != "none", **row)
    if dropout:
        use_seed(monkeypatch, case, dropout)
    check(case, frozen=("bias",) if bias == "frozen" else ())
    expected = [] if DEVICE.type == "cuda" and case.x.dtype == torch.float32 else ["forward", "backward"]
    assert calls == expected


@pytest.mark.parametrize(
    ("shape", "orientation"),
    [
        ((16, 300, 70, 5), "out"),
        ((32, 70, 300, 64), "out"),
        ((32, 300, 70, 16), "in"),
        ((33, 45, 150, 33), "in"),
        ((64, 45, 70, 64), "in"),
        ((112, 70, 300, 16), "in"),
    ],
    ids=str,
)
def test_the_largest_and_several_pieces(shape, orientation, monkeypatch, calls):
    use_multiprocessors(monkeypatch, 1000)
    check(draw(*shape, dtype=torch.bfloat16, orientation=orientation, depth=1, scaling=0.37))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_dropout(orientation, monkeypatch):
    case = draw(*SHAPE, dtype=torch.bfloat16, orientation=orientation)
    use_seed(monkeypatch, case, 0.4)
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("operand", ["x", "weight", "dy", "A", "B"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_layouts(orientation, operand, layout):
    case = draw(*SHAPE, dtype=torch.bfloat16, orientation=orientation)
    setattr(case, operand, layout(getattr(case, operand)))
    check(case)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_autocast_over_an_fp32_layer(dtype, orientation, calls):
    case = draw(*SHAPE, orientation=orientation, depth=1)
    case.encoders, case.weight = [transposed(case.encoders[0])], transposed(case.weight)
    with torch.autocast(DEVICE.type, dtype):
        results = check(case)
    assert calls == ["forward", "backward"]
    assert results["y"].dtype == dtype
    assert results["dx"].dtype == results["dA"].dtype == results["dbias"].dtype == torch.float32


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("trained", "small"),
    [
        (("x", "A"), True),
        (("x", "A", "encoders.0"), True),
        (("x", "A", "B"), True),
        (("x", "B", "bias"), False),
        (("A", "B", "bias"), False),
        (("x", "decoders.0"), False),
    ],
    ids=str,
)
def test_some_gradients(trained, small, orientation, calls):
    case = draw(*SHAPE, dtype=torch.bfloat16, orientation=orientation, depth=1)
    check(case, frozen={"x", "A", "B", "bias", "encoders.0", "decoders.0"} - set(trained))
    assert calls == ["forward", "backward"] if small else ["forward"]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_two_runs_are_bit_equal(orientation, monkeypatch):
    use_multiprocessors(monkeypatch, 1000)
    case = draw(31, 269, 131, 5, dtype=torch.bfloat16, depth=1, orientation=orientation)
    use_seed(monkeypatch, case, 0.5)
    first = fused(case)
    for name, value in fused(case).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize(
    ("orientation", "tokens", "r", "small"),
    [
        ("in", 112, 16, True),
        ("in", 113, 16, False),
        ("in", 127, 1, True),
        ("in", 64, 64, True),
        ("in", 3, 65, False),
        ("in", 0, 4, False),
        ("out", 32, 64, True),
        ("out", 33, 4, False),
        ("out", 0, 4, False),
    ],
)
def test_where_it_begins(orientation, tokens, r, small, calls):
    check(draw(tokens, 40, 50, r, dtype=torch.bfloat16, orientation=orientation))
    assert bool(calls) == small


def test_features_that_are_given_are_not_made_again(calls):
    case = draw(*SHAPE, dtype=torch.bfloat16)
    H = nk.functional.neat_features(case.weight, case.A, backend="triton")
    nk.functional.low_rank_linear(case.x, case.weight, H, case.B, backend="triton")
    assert not calls


def test_another_backend_has_no_such_plan(calls):
    case = draw(*SHAPE, dtype=torch.bfloat16)
    nk.functional.neat_linear(case.x, case.weight, case.A, case.B, backend="torch")
    assert not calls
    assert not plan.is_small_batch("torch", case.x.device, case.x.dtype, "out", 29, 5)


def call_of(orientation, dtype, r=5, tokens=M // 3, depth=0, dropout=0.0, bias=True):
    """Arguments of the plan's forward."""
    t, _ = tensors(dtype)
    columns = N if orientation == "out" else t["x"].shape[1]
    A, B = randn(r, columns), randn(columns, r)
    chain = randn(2 * depth, r, r) / 4 if depth else None
    seed = torch.tensor([77], device=DEVICE) if dropout else None
    on = {name: tensor.to(DEVICE) for name, tensor in t.items()}
    branch = Branch(0.7, dropout, None, "triton:fused:fused")
    forward = (
        on["x"][:tokens],
        on["W"],
        on["bias"] if bias else None,
        A,
        B,
        chain,
        seed,
        orientation,
        "sigmoid",
        branch,
    )
    return forward, on["dy"][:tokens]


def backward_call(forward, dy, S, H, Z, dB=torch.float32, dbias=torch.float32):
    x, weight, _, A, B, chain, seed, *network = forward
    return dy, x, weight, B, chain, S, H, Z, seed, *network, A.dtype, dB, chain is not None, dbias


GUARDED = pairwise.rows(
    {
        "orientation": ORIENTATIONS,
        "dtype": DTYPES,
        "depth": [0, 1, 2],
        "tokens": [1, 16, 32],
        "r": [1, 16, 33],
        "dropout": [0.0, 0.4],
        "bias": [False, True],
        "multiprocessors": [0, 1000],
    }
)


@pytest.mark.parametrize("row", GUARDED, ids=pairwise.name)
def test_between_guard_bands(row, monkeypatch):
    row = dict(row)
    use_multiprocessors(monkeypatch, row.pop("multiprocessors"))
    forward, dy = call_of(**row)
    _, S, H, Z = assert_guarded(small_batch.forward, *forward)
    assert_guarded(small_batch.backward, *backward_call(forward, dy, S, H, Z))
    assert_guarded(small_batch.backward, *backward_call(forward, dy, S, H, Z, dbias=None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter shows single accesses")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_weight_is_read_once_each_way_and_the_rest_as_elsewhere(accesses, orientation, dropout):  # noqa: F811
    forward, dy = call_of(orientation, torch.bfloat16, r=R, dropout=dropout)
    x, weight = forward[0].contiguous(), forward[1]
    y, S, H, Z = small_batch.forward(x, *forward[1:])
    assert (accesses.reads(weight) == 1).all()
    assert not accesses.reads(y).any()
    for made in (y, S, H, Z):
        assert (accesses.writes(made) == 1).all()
    dy = dy.contiguous()
    dx, dA, dB, _, dbias = small_batch.backward(*backward_call((x, *forward[1:]), dy, S, H, Z))
    assert (accesses.reads(weight) == 2).all()
    assert not accesses.reads(dx).any()
    for made in (dx, dA, dB, dbias):
        assert (accesses.writes(made) == 1).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_layers_explain_it(orientation):
    peft = pytest.importorskip("peft")
    from neat_kernels.integrations.peft import NeatConfig, accelerate

    options = {"r": 4, "target_modules": ["0"]}
    base = torch.nn.Sequential(torch.nn.Linear(12, 10, device=DEVICE, dtype=torch.bfloat16))
    if orientation == "out":
        model = peft.get_peft_model(base, peft.PeanutConfig(**options))
        accelerate(model, backend="triton")
    else:
        model = peft.get_peft_model(base, NeatConfig(orientation="in", backend="triton", **options))
    layer, x = model.base_model.model[0], torch.randn(4, 12, device=DEVICE, dtype=torch.bfloat16)
    ours = nk.FusedNeatLinear.from_linear(base[0].base_layer, r=4, orientation=orientation, backend="triton")
    for tokens in (x, x.repeat(100, 1)):
        told = layer.explain(tokens)
        assert told == str(ours.explain(tokens))
        assert ("small batch" in told) == (len(tokens) == 4)
    layer.eval()
    with torch.no_grad():
        assert "small batch" not in layer.explain(x)
