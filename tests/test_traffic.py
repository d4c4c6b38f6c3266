"""What a training step launches on a GPU, and which matrices each launch is given, seen under a fake driver."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from budget import draw_case, evaluate
from counting import InsideOps

pytest.importorskip("triton")
import neat_kernels as nk
from benchmarks import host_cost
from benchmarks.gate.fake_driver import capture
from neat_kernels.kernels import bound, measured
from neat_kernels.kernels import launch as launching
from neat_kernels.kernels.down import down
from neat_kernels.vocabulary import ORIENTATIONS

# Large enough for every reduction over rows to be split, 16-byte aligned.
M, N, K, R = 512, 1024, 1536, 16

# Operators that launch nothing: memory and views.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "t",
    "transpose",
    "select",
    "view",
    "_unsafe_view",
    "alias",
}


class Launches(InsideOps):
    """Names of the torch operators inside the package's own that would launch a kernel on a GPU."""

    def operator(self, func, args, kwargs):
        if func._opname == "addmm_":  # a CPU may take seconds for it, and nobody looks at the result
            self.seen.append(func._opname)
            return args[0]
        if func._opname == "all":  # of flags that no kernel has written
            self.seen.append(func._opname)
            return torch.ones((), dtype=torch.bool)
        result = func(*args, **kwargs)
        if func._opname not in _FREE and result is not args[0]:  # a cast to its own dtype launches nothing
            self.seen.append(func._opname)
        return result


@pytest.fixture(params=["fused", "cublas"])
def plan(request, monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.choose_gemm", lambda device, dtype, length: request.param)
    monkeypatch.setattr("neat_kernels.plan.device_obstacle", lambda device: None)
    return request.param


def training_step(case):
    """Forward and backward of a layer whose A, B, chain and input need gradients."""
    evaluate(nk.functional.neat_linear, case, frozen=("bias",), backend="triton")


def case_of(tokens=M, **options):
    return draw_case(tokens, N, K, R, dtype=torch.bfloat16, adapter_dtype=torch.float32, **options)


def observe(case, target="sm_90"):
    with capture(target) as launches, Launches() as torch_side:
        training_step(case)
    return launches, torch_side.seen


TOKEN_SIDE = {
    "down._down_kernel": 1,
    "up_backward._up_backward_kernel": 1,
    "up_finish._finish_kernel": 1,
    "down_backward._down_backward_kernel": 1,
}
BASE_GEMMS = {"fused": {"gemm_descriptor._gemm_descriptor_kernel": 2}, "cublas": {}}
# Kernels of the features and second stages of the reductions, the token side's one among them.
WEIGHT_SIDE = {
    ("out", 0): {
        "features._project_kernel": 1,
        "features._chain_forward_kernel": 1,
        "features_backward._weight_kernel": 1,
        "reduce._reduce_kernel": 2,
    },
    ("in", 0): {
        "features._project_kernel": 1,
        "features._chain_forward_kernel": 1,
        "features_backward._weight_kernel": 1,
        "reduce._reduce_kernel": 1,
    },
}
ALL = {"out": 11, "in": 10}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_launches_of_a_training_step(plan, orientation, dropout):
    case = case_of(orientation=orientation, dropout=dropout, training=True)
    launches, torch_side = observe(case)
    counted = Counter(launch.kernel for launch in launches)
    assert counted == Counter(TOKEN_SIDE | BASE_GEMMS[plan]) + Counter(WEIGHT_SIDE[orientation, 0])
    # cuBLAS runs twice; nothing else of torch's runs, but the draw of a dropout seed.
    assert torch_side == (["randint"] if dropout else []) + (["addmm_", "addmm_"] if plan == "cublas" else [])
    assert len(launches) + torch_side.count("addmm_") == ALL[orientation]


def test_launches_with_features_given(plan):
    x, weight = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(N, K, dtype=torch.bfloat16)
    down, up = torch.randn(K, R), torch.randn(N, R)
    leaves = [t.requires_grad_() for t in (x, down, up)]
    with capture("sm_90") as launches, Launches() as torch_side:
        y = nk.functional.low_rank_linear(*leaves[:1], weight, *leaves[1:], backend="triton")
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    torch_side.seen.remove("ones_like")
    assert len(launches) + len(torch_side.seen) == 7


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_chain_makes_it_twelve_launches_whatever_its_depth(plan, orientation):
    """Its stack and its backward, which for "out" adds the partial sums of dH and spares their own launch."""
    for depth, expected in ((0, ALL[orientation]), (1, 12), (3, 12)):
        launches, torch_side = observe(case_of(orientation=orientation, depth=depth, activation="tanh"))
        assert len(launches) + len(torch_side) == expected


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("frozen", "out", "in_"),
    [(["A"], 1, 1), (["B"], 1, 1), (["encoders.0", "decoders.0"], 1, 1), (["A", "encoders.0", "decoders.0"], 0, 1)],
    ids=["A", "B", "chain", "A and chain"],
)
def test_what_is_left_of_the_sums_is_one_launch(plan, orientation, frozen, out, in_):
    """Of dA or of dchain, with that of dB beside it for "in"; of the latter alone where nothing else is trained."""
    case = case_of(orientation=orientation, depth=1, activation="tanh")
    with capture("sm_90") as launches, Launches():
        evaluate(nk.functional.neat_linear, case, frozen=("bias", *frozen), backend="triton")
    sums = [launch.kernel for launch in launches].count("reduce._reduce_kernel")
    assert sums == {"out": out, "in": in_}[orientation]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merge_is_one_launch_beside_the_features(transposed, orientation, rounding, monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.device_obstacle", lambda device: None)
    base = pytest.importorskip("transformers").pytorch_utils.Conv1D(N, K) if transposed else torch.nn.Linear(K, N)
    layer = nk.FusedNeatLinear.from_linear(
        base.to(torch.bfloat16), r=R, orientation=orientation, backend="triton", dtype=torch.float32
    )
    seed = None if rounding == "nearest" else 3
    with capture("sm_90") as launches, Launches() as torch_side:
        merged = layer.merged_weight(rounding=rounding, seed=seed)
    assert [launch.kernel for launch in launches if "features" not in launch.kernel] == ["merge._merge_kernel"]
    given = launches[-1].tensors
    assert sorted(name for name, t in given.items() if t.numel() >= N * K) == ["out_ptr", "w_ptr"]
    assert given["out_ptr"].data_ptr() == merged.data_ptr()
    # The host reads whether every flag is set, and sends a seed to the device.
    assert [name for name in torch_side.seen if name != "lift_fresh"] == ["all", "_local_scalar_dense"]


def large(launch, case):
    """Names of the operands of W's, x's or dy's size that a launch is given."""
    smallest = min(case.x.numel(), case.dy.numel(), case.weight.numel())
    return sorted(name for name, t in launch.tensors.items() if t.numel() >= smallest)


OPERANDS = {
    "down._down_kernel": [["x_ptr"]],
    "gemm_descriptor._gemm_descriptor_kernel": [["a_desc", "b_desc", "c_desc"]] * 2,
    "up_backward._up_backward_kernel": [["dy_ptr"]],
    "down_backward._down_backward_kernel": [["x_ptr"]],
    "features._project_kernel": [["w_ptr"]],
    "features_backward._weight_kernel": [["w_ptr"]],
    "up_finish._finish_kernel": [[]],
    "features._chain_forward_kernel": [[]],
    "reduce._reduce_kernel": [[], []],
}


def test_each_launch_is_given_the_large_matrices_of_its_stage_and_no_others(monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.choose_gemm", lambda device, dtype, length: "fused")
    monkeypatch.setattr("neat_kernels.plan.device_obstacle", lambda device: None)
    case = case_of(tokens=2048)
    launches, _ = observe(case)
    given = {}
    for launch in launches:
        given.setdefault(launch.kernel, []).append(large(launch, case))
    assert given == OPERANDS


def test_partial_sums_stay_small(plan):
    case = draw_case(8192, 4096, 512, R, dtype=torch.bfloat16)
    launches, _ = observe(case)
    bytes_of = {launch.kernel: {name: t.nbytes for name, t in launch.tensors.items()} for launch in launches}
    up = bytes_of["up_backward._up_backward_kernel"]
    # 16 blocks of 256 columns and 8 pieces of 1,024 rows. With half as many programs it is 9.4 %, and slower.
    assert up["ds_ptr"] + up["du_ptr"] < 0.16 * up["dy_ptr"]
    down = bytes_of["down_backward._down_backward_kernel"]
    assert down["partial_ptr"] < 0.15 * down["x_ptr"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_another_number_of_tokens_compiles_nothing(plan, target):
    many, few = (2048, 129, 131, 1025, 512), (1, 7, 16)
    compiled = {}
    with capture(target) as launches:
        for tokens in (*many, *few):
            launches.clear()
            with Launches():
                training_step(case_of(tokens=tokens))
                training_step(case_of(tokens=tokens, depth=1, activation="tanh"))
            compiled[tokens] = {(launch.kernel, launch.compiled.hash) for launch in launches}
    for batches in (many, few):
        # Fewer, where a reduction over fewer tokens is a single piece.
        assert all(compiled[tokens] <= compiled[batches[0]] for tokens in batches)


def shifted(t):
    """The same values two bytes from where they were: no longer 16-byte aligned."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t)


def variants():
    """Layers that differ in what Triton compiles for, and in what it does not."""
    yield case_of()
    yield case_of(tokens=77)
    yield case_of(tokens=1)
    yield replace(case_of(tokens=77), x=shifted(case_of(tokens=77).x))
    yield replace(case_of(), weight=shifted(case_of().weight))
    yield replace(case_of(), weight=case_of().weight.t().contiguous().t())
    yield draw_case(64, 1031, 1537, R, dtype=torch.bfloat16)
    yield draw_case(64, 1024, 1536, 1, dtype=torch.float16)
    yield case_of(orientation="in", depth=1, activation="tanh")
    yield case_of(dropout=0.1, training=True)
    yield case_of(compute_dtype=torch.float32)
    yield case_of(bias=False)


def described(launches):
    """Kernels, grids and arguments; of tensors and descriptors their shapes."""

    def argument(value):
        return tuple(getattr(value, "shape", (value,)))

    return [
        (launch.kernel, launch.grid, launch.compiled.hash, {name: argument(v) for name, v in launch.arguments.items()})
        for launch in launches
    ]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_found_again_is_the_one_that_triton_finds(plan, target, monkeypatch):
    cases = [*variants()]
    launched = {}
    with capture(target) as launches, Launches():
        for turn in ("compiled", "found again"):
            for case in cases:
                training_step(case)
            launched[turn] = described(launches)
            launches.clear()
        runs = []
        run = bound.JITFunction.run
        monkeypatch.setattr(bound.JITFunction, "run", lambda *args, **kw: (runs.append(1), run(*args, **kw))[1])
        for case in cases:
            training_step(case)
        assert not runs, "Triton was asked for a kernel that had been launched"
        launches.clear()
        for case in cases:
            bound.forget()
            training_step(case)
        assert len(runs) > len(launches) / 2
        launched["by Triton"] = described(launches)
    assert launched["found again"] == launched["compiled"] == launched["by Triton"]


def test_a_launch_prepared_before_takes_what_is_measured_now():
    x, D = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(K, R)

    def block():
        down(x, D, None, 0.0, torch.bfloat16)
        return launches[-1].arguments["BLOCK_M"]

    with capture("sm_90") as launches:
        place = launching.target(x.device)
        key, before = measured.Key(place.arch, place.name, "down", R), block()
        other = launching.config("down", place, R, 2)._replace(block_m=2 * before)
        with launching.trying(key, other):
            assert block() == 2 * before
        assert block() == before
        launching.use_measured({key: other})
        assert block() == 2 * before
        launching.forget_measured()
        assert block() == before


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_hook_of_a_profiler_sees_every_launch(when):
    seen = []
    hooks = getattr(bound.knobs.runtime, f"launch_{when}_hook")
    x, D = torch.empty(M, K, dtype=torch.bfloat16), torch.empty(K, R)
    with capture("sm_90") as launches:
        down(x, D, None, 0.0, torch.bfloat16)
        hooks.add(seen.append)
        try:
            down(x, D, None, 0.0, torch.bfloat16)
        finally:
            hooks.remove(seen.append)
        down(x, D, None, 0.0, torch.bfloat16)
    assert len(launches) == 3
    assert [metadata.get()["name"] for metadata in seen] == ["_down_kernel"]


def test_a_driver_that_records_nothing(monkeypatch):
    monkeypatch.setattr("neat_kernels.plan.device_obstacle", lambda device: None)
    with capture("sm_90", record=False) as launches:
        training_step(case_of())
    assert launches == []


def test_host_cost(monkeypatch, tmp_path):
    monkeypatch.setattr(host_cost, "_ROUNDS", 2)
    monkeypatch.setattr(host_cost, "_CALLS", 1)
    assert host_cost.main(["--output", str(tmp_path / "host.json")]) == 0
    written = json.loads((tmp_path / "host.json").read_text())
    assert set(written["microseconds"]) == {"forward", "backward", "inference, features given"}
    for value in written["microseconds"].values():
        assert value["fastest"] <= value["median"] <= value["slowest"]
