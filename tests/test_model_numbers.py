"""What the performance model says: numbers worked out by hand, properties, peers as torch runs them, the command."""

import dataclasses
import json
import math
import re

import pytest
import torch
from counting import InsideOps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

pytest.importorskip("triton")
import neat_kernels as nk
from neat_kernels.bench.provenance import ROOT
from neat_kernels.cli import app
from neat_kernels.model import compare, cpu, devices, gemm, peers, predict, steps
from neat_kernels.model.work import Layer, Work

H200 = devices.DEVICES["H200"]
# The roofline alone, as the equations give it.
NO_GAP = dataclasses.replace(H200, gap=0.0)
LARGE = Layer(8192, 4096, 4096, adapter_dtype="bf16")
CPU_RESULTS = ROOT / "benchmarks" / "results" / "layer_ratio-cpu-epyc-avx2.json"


def ratio(step, layer, device=NO_GAP):
    (row,) = predict.compare_steps([step], peers.frozen(layer), device)
    return row.ratio


class TestNumbersWorkedOutByHand:
    def test_the_floor(self):
        """2·M·N·K operations at 790 TFLOP/s, twice; for few tokens W at 4.3 TB/s, twice."""
        assert predict.total(peers.frozen(LARGE).forward, NO_GAP).seconds == pytest.approx(348e-6, rel=1e-3)
        assert predict.total(peers.frozen(LARGE).launches, NO_GAP).flops == 4 * 8192 * 4096 * 4096
        few = peers.frozen(Layer(16, 4096, 4096))
        assert predict.total(few.forward, NO_GAP).bytes == 2 * (4096 * 4096 + 2 * 16 * 4096)
        assert predict.total(few.forward, NO_GAP).seconds == pytest.approx(7.87e-6, rel=1e-3)

    def test_lora_with_half_adapters(self):
        """x, y-sized passes: forward 1 + 1 + 2 + 3, backward 2 + 1 + 1, 1 + 1 + 3, each M·4096·2 bytes."""
        passes = (1 + 1 + 2 + 3) + (2 + 1 + 1) + (1 + 1 + 3)
        extra = passes * 8192 * 4096 * 2 / 4.3e12
        assert ratio(peers.peft_lora(LARGE), LARGE) == pytest.approx(1 + extra / 696e-6, rel=2e-3)
        assert ratio(peers.peft_lora(LARGE), LARGE) == pytest.approx(1.36, abs=0.005)
        tall = Layer(8192, 4096, 14336, adapter_dtype="bf16")
        assert ratio(peers.peft_lora(tall), tall) == pytest.approx(1.26, abs=0.005)

    def test_our_step_in_the_plan_of_cublas(self):
        """Reads of x (2) and dy, writes of both products, two reads of W, and the partial sums of the launch table."""
        layer = Layer(8192, 4096, 4096)
        row = 8192 * 4096 * 2
        W, S, D = 4096 * 4096 * 2, 8192 * 16, 4096 * 16
        # H200: 16 blocks of 256 columns and 8 pieces of rows for dS and dU; 4 pieces for dD's 64 blocks, 8 for the 32
        # of Z, 4 for the 32 of dA.
        up = 16 * S * 4 + 8 * D * 4
        down_pieces, Z_pieces, dA_pieces = 4, 8, 4
        extra = 3 * row + 2 * row + 2 * W + 2 * up + 2 * (down_pieces + Z_pieces + dA_pieces) * D * 4
        step = steps.training(layer, H200, "cublas")
        addmm = [work for work in step.launches if work.kernel == "torch.addmm_"]
        assert len(addmm) == 2
        assert all(work.bytes_read + work.bytes_written == 3 * row + row - row + W + row - row for work in addmm)
        others = [work for work in step.launches if work.kernel != "torch.addmm_"]
        counted = sum(work.bytes_read + work.bytes_written for work in others)
        # What is left are factors and S: r-wide, below 1 % together.
        assert extra < counted < 1.02 * extra
        assert ratio(step, layer) < 1.15

    def test_operations_of_the_fused_gemm(self):
        (apply,) = [w for w in steps.training(LARGE, H200, "fused").forward if "_gemm_" in w.kernel]
        assert apply.flops == 2 * 8192 * 4096 * (4096 + 16)
        assert apply.bytes_written == 8192 * 4096 * 2
        assert apply.efficiency == gemm.triton_efficiency("sm_90", 4096, "descriptors").value

    def test_what_binds(self):
        def bound(device, **work):
            return predict.predict(Work("k", {"a": work["bytes"]}, {}, work["flops"], "bf16"), device).bound

        assert bound(H200, bytes=1, flops=10**12) == "compute"
        assert bound(H200, bytes=10**9, flops=1) == "memory"
        assert bound(H200, bytes=1, flops=1) == "launch"

    def test_three_tf32_products_and_amd(self):
        assert H200.throughput("tf32x3") == pytest.approx(H200.throughput("bf16") / 6)
        features = steps.training(Layer(64, 1024, 1024), devices.DEVICES["MI300X"], "cublas").backward[-1]
        assert features.unit == "fp32"


LAYERS = st.builds(
    Layer,
    tokens=st.integers(1, 20000),
    in_features=st.integers(1, 200).map(lambda n: 64 * n),
    out_features=st.integers(1, 200).map(lambda n: 64 * n),
    r=st.integers(1, 128),
    dtype=st.sampled_from(["bf16", "fp16"]),
    orientation=st.sampled_from(["out", "in"]),
    depth=st.integers(0, 2),
    bias=st.booleans(),
)


class TestProperties:
    @settings(max_examples=60, deadline=None)
    @given(LAYERS, st.sampled_from(list(devices.DEVICES.values())), st.sampled_from(steps.GEMM_PLANS))
    def test_more_tokens_take_longer_and_nothing_beats_the_floor(self, layer, device, plan):
        more = dataclasses.replace(layer, tokens=2 * layer.tokens)
        for step in (lambda one: steps.training(one, device, plan), peers.peft_lora, peers.frozen):
            assert (
                predict.total(step(layer).launches, device).seconds
                <= predict.total(step(more).launches, device).seconds
            )
        assert ratio(steps.training(layer, device, plan), layer, device) > 1
        assert ratio(peers.peft_lora(layer), layer, device) > 1

    @settings(max_examples=60, deadline=None)
    @given(LAYERS, st.sampled_from(steps.GEMM_PLANS))
    def test_every_large_matrix_is_read_by_the_stages_that_need_it_and_no_byte_is_negative(self, layer, plan):
        step = steps.training(layer, H200, plan)
        for work in step.launches:
            assert all(size >= 0 for size in (*work.reads.values(), *work.writes.values(), work.flops))
        W = layer.in_features * layer.out_features * layer.itemsize
        assert sum(W == size for work in step.launches for name, size in work.reads.items() if name == "w_ptr") == 2

    @settings(max_examples=60, deadline=None)
    @given(LAYERS, st.sampled_from(steps.GEMM_PLANS), st.floats(1.1, 10))
    def test_a_faster_device_is_faster(self, layer, plan, factor):
        step = steps.training(layer, H200, plan)
        base = predict.total(step.launches, H200).seconds
        for better in (
            dataclasses.replace(H200, bandwidth=factor * H200.bandwidth),
            dataclasses.replace(H200, reached=factor * H200.reached),
            dataclasses.replace(H200, gap=H200.gap / factor),
        ):
            assert predict.total(step.launches, better).seconds <= base


class Recorder(InsideOps):
    """(operator, bytes of the tensors that it takes, bytes of those that it makes), without views."""

    VIEWS = ("t", "transpose", "detach", "view", "_unsafe_view", "alias", "select", "slice", "empty", "new_empty")

    def operator(self, func, args, kwargs):
        result = func(*args, **kwargs)
        if (func._opname not in self.VIEWS and result is not args[0]) or func._opname.endswith("_"):
            sizes = [[t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor) and t.ndim]
                     for part in ((args, kwargs), result)]  # fmt: skip
            self.seen.append((func._opname, *map(sorted, sizes)))
        return result


def modelled(step):
    return [
        (w.kernel.removeprefix("torch."), sorted(w.reads.values()), sorted(w.writes.values())) for w in step.launches
    ]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")]
)
def test_lora_is_what_peft_runs(dtype, adapter_dtype):
    peft = pytest.importorskip("peft")
    layer = Layer(48, 96, 80, 4, dtype, adapter_dtype, bias=True)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(96, 80, dtype=torch_dtype)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["linear"])
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter_dtype == "fp32")
    x = torch.randn(48, 96, dtype=torch_dtype, requires_grad=True)
    dy = torch.randn(48, 80, dtype=torch_dtype)
    with Recorder() as recorder:
        adapted.base_model.model.linear(x).backward(dy)
    assert recorder.seen == modelled(peers.peft_lora(layer))


def test_the_torch_backend_is_what_the_model_says(monkeypatch):
    """In fp32, operation for operation; of an operation's operands the model leaves out scalars alone."""
    monkeypatch.setattr("neat_kernels.cpu.takes", lambda a, narrow: False)
    layer = Layer(600, 96, 80, 4, "fp32", bias=True)
    fused = nk.FusedNeatLinear.from_linear(torch.nn.Linear(96, 80), r=4)
    x, dy = torch.randn(600, 96, requires_grad=True), torch.randn(600, 80)
    with Recorder() as recorder:
        fused(x).backward(dy)
    # A cast to the dtype that a tensor has does nothing, and in-place operations return what they were given.
    seen = [(name, sum(reads)) for name, reads, _ in recorder.seen if name not in ("to", "_to_copy", "copy_")]
    said = [
        (w.kernel.removeprefix("torch."), w.bytes_read)
        for w in cpu.torch_backend(layer, casts_blocks=False).launches
        if w.kernel != "torch.copy_"
    ]
    assert seen == said
    copies = [name for name, *_ in recorder.seen if name == "copy_"]
    assert len(copies) == sum(w.kernel == "torch.copy_" for w in cpu.torch_backend(layer, False).launches)


class TestComparison:
    def slow_half(self, case):
        """A CPU whose bf16 GEMM is a scalar loop."""
        peak = {"fp32": 1.8e11, "tf32": 1.8e11, "half": 2e9}
        return devices.Device("a CPU", "", "", 2, 0, 2e10, 2e10, peak, 1.0, 5e-6, {})

    def test_of_the_committed_results(self):
        rows = compare.compare(compare.read_results(CPU_RESULTS), self.slow_half)
        assert [row.contender for row in rows] == ["frozen", "neat", "peft_lora", "peft_peanut"] * 2
        by_case = {(row.case.split()[1], row.contender): row for row in rows}
        assert by_case["float32", "frozen"].measured == pytest.approx(48.4, abs=0.1)
        assert by_case["float32", "frozen"].predicted == pytest.approx(1e3 * 4 * 2048 * 1024**2 / 1.8e11, rel=1e-3)
        assert by_case["bfloat16", "frozen"].predicted == pytest.approx(1e3 * 4 * 2048 * 1024**2 / 2e9, rel=1e-3)
        # The torch backend does not take the scalar loop.
        assert by_case["bfloat16", "neat"].predicted < 0.05 * by_case["bfloat16", "peft_lora"].predicted
        assert all(row.predicted is None and row.ratio is None for row in rows if row.contender == "peft_peanut")

    def test_of_times_under_cuda_graphs_where_there_are_any(self):
        results = compare.read_results(ROOT / "benchmarks/results/2026-11-27-nvidia-h200/layer-8192x4096.json")
        by_contender = {row.contender: row for row in compare.compare(results)}
        assert by_contender["neat"].case == "8192x4096x4096x16 bfloat16, CUDA graphs"
        assert by_contender["neat"].measured == results.cases[0]["summary"]["graphs"]["ms"]["neat"]

    def test_of_results_of_a_gpu_takes_the_device_that_the_file_names(self):
        results = compare.read_results(CPU_RESULTS)
        case = results.cases[1] | {"device": "cuda", "summary": {"ms": {"frozen": 1.0, "neat": 1.2, "neat_half": 1.1}}}
        rows = compare.compare(results._replace(device="NVIDIA H200", cases=[case]))
        assert all(row.predicted < 0.2 for row in rows)
        with pytest.raises(ValueError, match=r"expected results of a device the model knows .*, got 'NVIDIA T4'"):
            compare.compare(results._replace(device="NVIDIA T4", cases=[case]))

    def test_ceilings_are_measured_and_the_threads_put_back(self, monkeypatch):
        monkeypatch.setattr(cpu, "_fastest", lambda call: (call(), 0.5)[1])
        before = torch.get_num_threads()
        device = cpu.measured_cpu("bf16", before + 1)
        assert torch.get_num_threads() == before
        assert device.bandwidth == 4 * cpu._COPIED
        assert device.throughput("fp32") == 4 * 1024**3
        assert device.throughput("bf16") == 4 * 256**3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 129}, "r must be at most 128"),
        ({"r": 0}, "r must be at least 1"),
        ({"tokens": -1}, "tokens must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of 'bf16', 'fp16', 'fp32'"),
        ({"adapter_dtype": "fp16"}, "adapter_dtype must be one of 'fp32', 'bf16'"),
        ({"orientation": "up"}, "orientation must be one of"),
        ({"depth": -1}, "depth must be at least 0"),
    ],
)
def test_a_layer_that_is_none(options, message):
    with pytest.raises(ValueError, match=message):
        Layer(**{"tokens": 1, "in_features": 64, "out_features": 64} | options)


class TestDevices:
    def test_by_the_name_that_a_driver_reports(self):
        assert devices.reported_as("NVIDIA A100-SXM4-80GB").name == "A100"
        assert devices.reported_as("AMD Instinct MI300X OAM").name == "MI300X"
        for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", ""):
            assert devices.reported_as(other) is None

    @pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda device: device.name)
    def test_numbers_are_of_their_order_and_have_a_source(self, device):
        assert 5e11 < device.bandwidth < device.peak_bandwidth < 1e13
        assert 1e13 < device.throughput("fp32") < device.throughput("bf16") < device.peak["half"] < 3e15
        assert device.throughput("tf32x3") < device.throughput("bf16") / 3
        assert 0 < device.gap < 1e-5
        assert all(device.sources[what] for what in ("peaks", "reached", "gap"))


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, arguments)])


class TestCommand:
    def test_tables_say_that_they_are_predictions(self):
        result = run("--model", "--device", "h200", "--shape", "8192x4096x4096")
        assert result.exit_code == 0, result.output
        assert result.output.count("predicted, not measured") == 3
        for word in ("down._down_kernel", "gemm_descriptor", "frozen linear", "PEFT LoRA, fp32 adapter",
                     "4.3 of 4.8 TB/s", "chosen plan: fused", "cached features", "fits into the 50 MiB"):  # fmt: skip
            assert word in result.output

    def test_the_default_is_the_layers_of_the_budgets(self):
        result = run("--model")
        assert result.exit_code == 0
        for layer in ("M=8192, 4096→4096", "M=8192, 4096→14336", "M=2048, 768→768", "M=16, 4096→4096"):
            assert layer in result.output

    @pytest.mark.parametrize("device", devices.DEVICES)
    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_json(self, device, dtype, tmp_path):
        path = tmp_path / "p.json"
        arguments = ("--model", "--device", device, "--dtype", dtype, "--r", 8, "--json", path)
        assert run(*arguments, "--shape", "64x128x256", "--shape", "1x64x64").exit_code == 0
        content = json.loads(path.read_text())
        assert content["kind"] == "predicted, not measured"
        assert content["device"]["name"] == device
        assert [case["shape"] for case in content["cases"]] == ["64x128x256", "1x64x64"]
        for case in content["cases"]:
            assert (case["r"], case["dtype"]) == (8, dtype)
            for step in case["steps"]:
                assert step["in_all"]["seconds"] == pytest.approx(sum(k["seconds"] for k in step["kernels"]))
                assert math.isfinite(step["ratio_to_frozen"])
        assert [path.name for path in tmp_path.iterdir()] == ["p.json"]

    def test_a_file_that_is_there_is_kept_unless_told_otherwise(self, tmp_path):
        path = tmp_path / "p.json"
        path.write_text("mine")
        arguments = ("--model", "--shape", "1x64x64", "--json", path)
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert "is there already: choose another, or add --overwrite" in refused.output
        assert path.read_text() == "mine"
        assert run(*arguments, "--overwrite").exit_code == 0
        assert json.loads(path.read_text())

    def test_a_plan_that_is_asked_for_is_the_only_one(self):
        output = run("--model", "--shape", "64x4096x4096", "--plan", "fused").output
        assert "gemm_descriptor._gemm_descriptor_kernel" in output
        assert "neat-kernels, cublas" not in output

    def test_comparison(self, monkeypatch):
        monkeypatch.setattr(cpu, "_fastest", lambda call: (call(), 0.01)[1])
        result = run("--model", "--measured", CPU_RESULTS)
        assert result.exit_code == 0, result.output
        for word in ("Measured on AMD EPYC", "2048x1024x1024x16 float32", "not modelled", "off by a factor of"):
            assert word in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("quick", "--model"), "the preset 'quick' is not read with --model"),
            (("--model", "--threads", "2"), "--threads is not read with --model"),
            (("--model", "--compare", CPU_RESULTS), "predictions stand beside the measurements of --measured FILE"),
            (("--model", "--device", "H20"), "expected a device the model knows (H200, H100, A100"),
            (("--model", "--shape", "64x64"), "--shape must be TOKENSxINxOUT"),
            (("--model", "--shape", "64x64x-1"), "--shape must be TOKENSxINxOUT"),
            (("--model", "--shape", "0x64x64"), "tokens must be at least 1, got 0"),
            (("--model", "--r", "129"), "r must be at most 128"),
            (("--model", "--rank", "0"), "r must be at least 1, got 0"),
            (("--model", "--dtype", "int8"), "--dtype must be one of bf16, fp16, fp32"),
            (("--model", "--plan", "best"), "--plan must be one of auto, fused, cublas"),
            (("--model", "--plan", "fused", "--dtype", "fp32"), "--plan fused takes half precision"),
            (("--model", "--json", "/no/such/folder/p.json"), "--json must be a file in a folder that is there"),
            (("--model", "--overwrite"), "--overwrite is read with --json only"),
            (("--model", "--measured", "no.json"), "expected a result file of benchmarks.layer_ratio"),
            (("--model", "--measured", CPU_RESULTS, "--device", "H200"), "--device is not read with --measured"),
        ],
    )
    def test_refused(self, arguments, message):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "predicted" not in result.output

    @pytest.mark.parametrize("content", ["{}", "[]", '{"provenance": {}, "cases": [1]}'])
    def test_a_file_that_holds_something_else(self, content, tmp_path):
        path = tmp_path / "other.json"
        path.write_text(content)
        result = run("--model", "--measured", path)
        assert result.exit_code == 2
        assert "expected a result file of benchmarks.layer_ratio" in result.output


def test_the_table_in_the_documentation_is_what_the_model_says():
    page = (ROOT / "docs" / "performance-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| M=(\d+), (\d+)→(\d+) \| ([\d.]+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for *sizes, floor, ratios in rows:
        layer = Layer(*map(int, sizes))
        narrow = dataclasses.replace(layer, adapter_dtype="bf16")
        ways = [steps.training(layer, H200, plan) if plan in steps.plans(layer) else None for plan in steps.PLANS]
        ways += [peers.peft_lora(narrow), peers.peft_lora(layer)]
        ways.append(steps.inference(layer, H200, steps.chosen_plan(layer, H200)))
        assert floor == f"{1e6 * predict.total(peers.frozen(layer).launches, H200).seconds:.1f}"
        assert ratios.split(" | ") == ["" if way is None else f"{ratio(way, layer, H200):.2f}" for way in ways]
