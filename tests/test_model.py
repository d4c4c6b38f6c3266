"""The performance model: it launches what the host code launches, and its numbers are those of the equations."""

from collections import Counter

import pytest
import torch
from budget import draw_case
from test_traffic import Launches, training_step

pytest.importorskip("triton")
import neat_kernels as nk
from benchmarks.gate.fake_driver import capture
from benchmarks.gate.targets import TARGETS
from neat_kernels.kernels import launch
from neat_kernels.model import devices, gemm, steps
from neat_kernels.model.work import Layer

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A device of the model for every target that the fake driver knows of it, by name.
ON_TARGET = {"sm_80": "A100", "sm_89": "RTX 4090", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}

LAYERS = {
    "many tokens": Layer(4096, 512, 1024),
    "wide": Layer(512, 2048, 768, bias=True),
    "few tokens": Layer(16, 1024, 1024),
    "one token": Layer(1, 1024, 768),
    "odd rank": Layer(1024, 768, 768, r=7),
    "rank 128": Layer(640, 512, 1024, r=128),
    "in": Layer(512, 1536, 1024, orientation="in"),
    "half adapter": Layer(512, 1536, 1024, adapter_dtype="bf16"),
    "chain": Layer(512, 1536, 1024, depth=2),
    "chain, in": Layer(512, 1024, 1536, depth=1, orientation="in"),
    "fp32": Layer(512, 768, 1024, dtype="fp32"),
}
ELSEWHERE = [("sm_80", "chain"), ("sm_89", "wide"), ("sm_100", "many tokens"), ("gfx942", "in")]

# Operands that a launch is given and does not touch, since a later launch makes them or the chain's has used them.
_UNTOUCHED = {
    "features._project_kernel": {"h_ptr", "chain_ptr", "trace_ptr"},
    "features_backward._weight_kernel": {"z_ptr"},
}


def case_of(layer):
    return draw_case(
        layer.tokens, layer.out_features, layer.in_features, layer.r,
        dtype=TORCH_DTYPES[layer.dtype], adapter_dtype=TORCH_DTYPES[layer.adapter_dtype],
        orientation=layer.orientation, depth=layer.depth, activation="tanh" if layer.depth else "relu",
        bias=layer.bias,
    )  # fmt: skip


@pytest.fixture
def use_plan(monkeypatch):
    def use(plan):
        monkeypatch.setattr("neat_kernels.plan.choose_gemm", lambda device, dtype, length: plan)
        monkeypatch.setattr("neat_kernels.plan.device_obstacle", lambda device: None)

    return use


def assert_same_launches(launches, modelled):
    """Name for name, and operand for operand in bytes, in the order in which they run."""
    ours = [work for work in modelled if not work.kernel.startswith("torch.")]
    assert [launch.kernel for launch in launches] == [work.kernel for work in ours]
    for seen, work in zip(launches, ours, strict=True):
        given = {name: t.nbytes for name, t in seen.tensors.items()}
        said = work.reads | work.writes
        assert set(given) - set(said) <= _UNTOUCHED.get(work.kernel, set()), work.kernel
        assert {name: given.get(name) for name in said} == said, work.kernel


@pytest.fixture(scope="module")
def on_h200():
    """One capture for all cases, so that a kernel is compiled once."""
    with capture("sm_90") as launches:
        yield launches


def launched(layer, launches):
    case = case_of(layer)
    launches.clear()
    with Launches() as torch_side:
        training_step(case)
    return torch_side.seen


def assert_modelled(layer, device, plan, launches, torch_side):
    step = steps.training(layer, device, plan)
    assert_same_launches(launches, step.launches)
    of_torch = [work.kernel.removeprefix("torch.") for work in step.launches if work.kernel.startswith("torch.")]
    assert Counter(torch_side) == Counter(of_torch)


@pytest.mark.parametrize("plan", steps.PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_launches_what_the_model_says(name, plan, use_plan, on_h200):
    layer = LAYERS[name]
    if plan not in steps.plans(layer):
        pytest.skip("fp32 has no such plan on a GPU")
    use_plan(plan)
    torch_side = launched(layer, on_h200)
    assert_modelled(layer, devices.DEVICES["H200"], plan, on_h200, torch_side)


@pytest.mark.parametrize(("target", "name"), ELSEWHERE)
def test_and_so_it_does_on_other_devices(target, name, use_plan):
    use_plan("cublas")
    with capture(target) as launches:
        torch_side = launched(LAYERS[name], launches)
    assert_modelled(LAYERS[name], devices.DEVICES[ON_TARGET[target]], "cublas", launches, torch_side)


@pytest.mark.parametrize("plan", steps.PLANS)
def test_inference_with_cached_features_launches_what_the_model_says(plan, use_plan, on_h200):
    layer = Layer(16, 1024, 768)
    use_plan(plan)
    case = case_of(layer)
    down, up = (t.detach().to(torch.bfloat16) for t in (case.A.new_empty(1024, 16), case.B))
    on_h200.clear()
    with torch.no_grad(), Launches() as torch_side:
        nk.functional.low_rank_linear(case.x, case.weight, down, up, backend="triton")
    step = steps.inference(layer, devices.DEVICES["H200"], plan)
    assert_same_launches(on_h200, step.launches)
    assert len(torch_side.seen) == (plan == "cublas")


@pytest.mark.parametrize("name", ON_TARGET.values())
def test_a_device_is_the_one_that_launches_are_configured_for(name):
    device = devices.DEVICES[name]
    (target,) = [t for t in TARGETS.values() if ON_TARGET.get(t.name) == name]
    arch = launch.family(target.arch) if target.is_cuda else target.arch
    assert launch.Target(arch, target.multiprocessors) == steps.target_of(device)


def test_the_curve_of_the_gemm_is_that_of_the_kernel_that_is_there(use_plan, on_h200):
    use_plan("fused")
    launched(LAYERS["few tokens"], on_h200)
    operands = [seen.arguments["a_ptr"] for seen in on_h200 if seen.kernel == "gemm._gemm_kernel"]
    assert operands
    assert {isinstance(operand, torch.Tensor) for operand in operands} == {gemm.LOADS == "pointers"}
