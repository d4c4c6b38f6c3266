"""The performance model: it launches what the host code launches, and its numbers are those of the equations."""

import json
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from budget import draw_case
from test_traffic import Launches, training_step

pytest.importorskip("triton")
import neat_kernels as nk
from benchmarks.gate.fake_driver import capture
from benchmarks.gate.targets import TARGETS
from neat_kernels import plan
from neat_kernels.kernels import launch
from neat_kernels.model import devices, gemm, measured, steps
from neat_kernels.model.work import Layer

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A device of the model for every target that the fake driver knows of it, by name.
ON_TARGET = {"sm_80": "A100", "sm_89": "RTX 4090", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}

LAYERS = {
    "many tokens": Layer(4096, 256, 4096),
    "wide": Layer(512, 2048, 768, bias=True),
    "few tokens": Layer(16, 1024, 1024),
    "one token": Layer(1, 1024, 768),
    "few tokens, in": Layer(64, 1024, 768, r=33, orientation="in", bias=True),
    "few tokens, chain": Layer(32, 768, 1024, depth=2),
    "few tokens, half adapter": Layer(40, 768, 1024, r=64, adapter_dtype="bf16", orientation="in", depth=1),
    "odd rank": Layer(1024, 768, 768, r=7),
    "rank 128": Layer(640, 512, 1024, r=128),
    "no descriptor": Layer(256, 516, 516),
    "in": Layer(512, 1536, 1024, orientation="in"),
    "half adapter": Layer(512, 1536, 1024, adapter_dtype="bf16"),
    "chain": Layer(512, 1536, 1024, depth=2),
    "chain, in": Layer(512, 1024, 1536, depth=1, orientation="in"),
    "fp32": Layer(512, 768, 1024, dtype="fp32"),
}
ELSEWHERE = [("sm_80", "chain"), ("sm_89", "wide"), ("sm_100", "many tokens"), ("gfx942", "in")]
SMALL_ELSEWHERE = [("sm_80", "few tokens, in"), ("sm_100", "few tokens"), ("gfx942", "few tokens, chain")]

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
        if plan != "small":
            monkeypatch.setattr("neat_kernels.plan.choose_gemm", lambda device, dtype, length: plan)
            monkeypatch.setattr("neat_kernels.plan.SMALL_BATCH", 0)
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


@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name in LAYERS for plan in steps.plans(LAYERS[name])])
def test_a_training_step_launches_what_the_model_says(name, plan, use_plan, on_h200):
    layer = LAYERS[name]
    use_plan(plan)
    torch_side = launched(layer, on_h200)
    assert_modelled(layer, devices.DEVICES["H200"], plan, on_h200, torch_side)


@pytest.mark.parametrize(("target", "name"), ELSEWHERE)
def test_and_so_it_does_on_other_devices(target, name, use_plan):
    use_plan("cublas")
    with capture(target) as launches:
        torch_side = launched(LAYERS[name], launches)
    assert_modelled(LAYERS[name], devices.DEVICES[ON_TARGET[target]], "cublas", launches, torch_side)


@pytest.mark.parametrize(("target", "name"), SMALL_ELSEWHERE)
def test_few_tokens_on_other_devices(target, name, use_plan):
    use_plan("small")
    with capture(target) as launches:
        torch_side = launched(LAYERS[name], launches)
    assert_modelled(LAYERS[name], devices.DEVICES[ON_TARGET[target]], "small", launches, torch_side)


@pytest.mark.parametrize("plan", steps.GEMM_PLANS)
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


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device that has the name of another, with no plan measured and nothing remembered."""

    def named(name):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name))
        plan.fused_limit.cache_clear()
        return torch.device("cuda", 0)

    monkeypatch.setattr("neat_kernels.plan._device_obstacle", lambda device: None)
    yield named
    plan.fused_limit.cache_clear()


class TestChoiceOfThePlan:
    def test_from_the_model_where_it_knows_the_device(self, gpu):
        limit = gemm.fused_up_to(devices.DEVICES["A100"], "bf16")
        device = gpu("NVIDIA A100-SXM4-80GB")
        assert 1024 < limit < 4096
        assert plan.choose_gemm(device, torch.bfloat16, limit) == "fused"
        assert plan.choose_gemm(device, torch.bfloat16, limit + 1) == "cublas"
        told = plan.make_plan("triton", device, torch.bfloat16, torch.float32, 16, limit, limit + 64)
        assert told.base_gemm == "fused forward, cublas backward"
        assert f"fused up to a reduction of {limit}" in told.reason
        assert "from the cost model of NVIDIA A100-SXM4-80GB, a prediction" in told.reason

    @pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA L40S", "a device of tomorrow"])
    def test_by_a_rule_where_it_does_not(self, gpu, name):
        device = gpu(name)
        assert plan.choose_gemm(device, torch.float16, plan.FUSED_UP_TO) == "fused"
        assert plan.choose_gemm(device, torch.float16, plan.FUSED_UP_TO + 1) == "cublas"
        told = plan.make_plan("triton", device, torch.float16, torch.float32, 16, 64, 64)
        assert "a rule, since" in told.reason

    def test_a_measurement_wins(self, gpu, monkeypatch, tmp_path):
        written = {"device": "NVIDIA A100-SXM4-80GB", "dtype": "bfloat16", "fused_up_to": 640, "source": "tuner, today"}
        path = tmp_path / "plans.json"
        path.write_text(json.dumps({"plans": [written]}))
        monkeypatch.setattr(measured.measured_plan, "__defaults__", (path,))
        monkeypatch.setattr(measured.measured_limit, "__defaults__", (path,))
        device = gpu(written["device"])
        for length, expected in ((640, "fused"), (704, "cublas")):
            assert steps.chosen_plan(Layer(4096, length, length), devices.DEVICES["A100"]) == expected
        assert plan.choose_gemm(device, torch.bfloat16, 640) == "fused"
        assert plan.choose_gemm(device, torch.bfloat16, 641) == "cublas"
        told = plan.make_plan("triton", device, torch.bfloat16, torch.float32, 16, 641, 641)
        assert "measured on NVIDIA A100-SXM4-80GB: tuner, today" in told.reason
        assert "cost model" in plan.fused_limit(device, torch.float16).source

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", '{"plans": [1]}', '{"plans": [{"device": "x"}]}',
         '{"plans": [{"device": "x", "dtype": "float32", "fused_up_to": 1, "source": ""}]}',
         '{"plans": [{"device": "x", "dtype": "float16", "fused_up_to": "1", "source": ""}]}'],
    )  # fmt: skip
    def test_a_file_that_is_not_one_is_an_error(self, content, tmp_path):
        path = tmp_path / "plans.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"plans\.json: expected"):
            measured.measured_plan("x", "float16", path)

    def test_fp32_is_cublas_s_and_asks_nobody(self):
        assert plan.choose_gemm(torch.device("cuda", 0), torch.float32, 64) == "cublas"

    @pytest.mark.parametrize("name", ["H200", "A100"])
    def test_the_limit_is_where_the_predicted_times_cross(self, name):
        """Fused saves one write of y and pays for a slower GEMM, whatever the number of tokens."""
        device = devices.DEVICES[name]
        limit = gemm.fused_up_to(device, "bf16")
        for length in range(64, 8192, 64):
            lost = (length + 16) / gemm.triton_efficiency(
                device.arch, length, steps.aligned_loads(device)
            ).value - length
            saved = 2 * device.throughput("bf16") / (2 * device.bandwidth)
            # What the small factors cost is not in this equation.
            if abs(lost - saved) > 0.02 * saved:
                assert (lost < saved) == (length <= limit), length

    def test_tracing_sees_a_constant(self):
        """A compiler must not look into the choice: it reads a device's name and perhaps a file."""

        def scaled(x):
            return x * plan._fused_up_to(torch.device("cuda", 0), torch.bfloat16)

        plan.fused_limit.cache_clear()
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(name="unknown")):
            compiled = torch.compile(scaled, fullgraph=True, backend="eager")
            assert compiled(torch.ones(())) == plan.FUSED_UP_TO
        plan.fused_limit.cache_clear()
