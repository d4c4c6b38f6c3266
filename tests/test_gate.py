import json
import re
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gate.__main__ import main
from benchmarks.gate.accesses import TMA
from benchmarks.gate.fake_driver import capture
from benchmarks.gate.machine_code import inspect
from benchmarks.gate.rules import Expectations, violations
from benchmarks.gate.targets import TARGETS, blocks_per_multiprocessor
from neat_kernels.kernels import launch as package_launch

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")

MMA = {"sm_80": "mma.sync bf16", "sm_90": "wgmma bf16", "sm_100": "tcgen05 f16", "gfx942": "mfma bf16"}


@triton.jit
def _gemm(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = start + offs_k < K
        a = tl.load(a_ptr + offs_m[:, None] * K + start + offs_k[None, :], mask=mask[None, :], other=0.0)
        b = tl.load(b_ptr + offs_n[:, None] * K + start + offs_k[None, :], mask=mask[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _descriptors(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.dot(a.load([0, 0]), b.load([0, 0]).T)
    for start in range(BLOCK_K, K, BLOCK_K):
        acc = tl.dot(a.load([0, start]), b.load([0, start]).T, acc)
    c.store([0, 0], acc.to(tl.bfloat16))


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _indexed_array(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.inline_asm_elementwise(
        """{
        .local .align 4 .b32 array[2]; .reg .b64 address; .reg .b32 index;
        mov.u64 address, array; st.local.b32 [address], $1; st.local.b32 [address + 4], 7;
        and.b32 index, $1, 1; mad.wide.u32 address, index, 4, address; ld.local.b32 $0, [address];
        }""",
        "=r,r", [x], tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    tl.store(y_ptr + offs, y, mask=offs < n)


@triton.jit
def _add_atomically(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _copy_one_of_two(x_ptr, z_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = x_ptr
    if tl.program_id(1) == 1:
        source = z_ptr
    tl.store(y_ptr + offs, tl.load(source + offs, mask=offs < n), mask=offs < n)


@triton.jit
def _copy_from_address(address_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    source = tl.load(address_ptr).to(tl.pointer_type(tl.bfloat16))
    tl.store(y_ptr + offs, tl.load(source + offs))


@triton.jit
def _does_not_compile(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.arange(0, BLOCK))


def gemm(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=2, dtype=torch.bfloat16, M=1024, N=512, K=1024):
    a, b, c = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
    grid = (M // block_m, N // block_n)
    _gemm[grid](a, b, c, M, N, K, block_m, block_n, block_k, num_warps=num_warps, num_stages=num_stages)
    return a, b, c


def descriptors():
    a, b, c = gemm()
    blocks = [TensorDescriptor.from_tensor(t, shape) for t, shape in ((a, [128, 64]), (b, [128, 64]), (c, [128, 128]))]
    _descriptors[(1,)](*blocks, 1024, 128, 128, 64, num_warps=8, num_stages=3)


def elementwise(kernel, n=4096, block=1024, dtype=torch.bfloat16, offset=0, **options):
    x, y = torch.empty(n + offset, dtype=dtype)[offset:], torch.empty(n, dtype=dtype)
    kernel[(n // block,)](x, y, n, block, **options)


def last_report(target, host, *args, **kwargs):
    with capture(target) as launches:
        host(*args, **kwargs)
    return inspect(launches[-1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_good_kernel_passes(target):
    report = last_report(target, gemm)
    widths = {"a_ptr": 16, "b_ptr": 16, "c_ptr": 16 if target != "gfx942" else 8}
    assert violations(report, Expectations((MMA[target],), widths)) == []
    assert {access.operand for access in report.accesses} == {"a_ptr", "b_ptr", "c_ptr"}
    assert report.blocks_per_multiprocessor >= 1


def test_descriptors_are_wide_and_have_their_names():
    report = last_report("sm_90", descriptors)
    assert {(a.kind, a.operand, a.width) for a in report.accesses} == {
        ("load", "a", TMA), ("load", "b", TMA), ("store", "c", TMA)
    }  # fmt: skip
    assert violations(report, Expectations(("wgmma bf16",), {"a": 16, "b": 16, "c": 16})) == []


def test_a_spill_is_found():
    # One warp holds 256 values a thread while the store waits for all of them; a thread has 255 registers.
    report = last_report("sm_80", elementwise, _copy, n=8192, block=8192, dtype=torch.float32, num_warps=1)
    found = violations(report, Expectations())
    assert report.spill_stores > 0
    assert [text.partition(":")[0] for text in found] == ["spills", "local memory"]


def test_a_spill_is_found_on_amd():
    report = last_report("gfx942", gemm, 256, 256, 32, num_warps=4)
    assert any(text.startswith("spills") for text in violations(report, Expectations(None)))


def test_local_memory_without_a_spill_is_found():
    report = last_report("sm_80", elementwise, _indexed_array, dtype=torch.int32)
    assert report.spill_stores == report.spill_loads == 0
    assert [text.partition(":")[0] for text in violations(report, Expectations())] == ["local memory"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_an_atomic_is_found(target):
    found = violations(last_report(target, elementwise, _add_atomically, dtype=torch.float32), Expectations())
    assert found
    assert all(text.startswith("atomic") for text in found)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_narrow_loads_are_found(target):
    # A base that is off by one value: the compiler knows no alignment beyond that of the type.
    report = last_report(target, elementwise, _copy, block=2048, offset=1)
    found = violations(report, Expectations(widths={"x_ptr": 16, "y_ptr": 16}))
    assert len(found) == 1
    assert re.fullmatch(r"narrow loads of x_ptr: expected 16 bytes, got \d+ × 2", found[0])
    assert violations(report, Expectations(widths={"x_ptr": 2})) == []


def test_too_much_shared_memory_is_found_without_stopping_the_host_code():
    report = last_report("sm_86", gemm, 128, 256, 64, num_stages=4)
    assert report.shared > report.shared_limit == 101376
    assert report.blocks_per_multiprocessor == 0
    found = violations(report, Expectations(("mma.sync bf16",)))
    assert any(text.startswith("shared memory") for text in found)
    fits = last_report("sm_90", gemm, 128, 256, 64, num_stages=4)
    assert not any(text.startswith("shared memory") for text in violations(fits, Expectations(("wgmma bf16",))))


def test_too_few_blocks_are_found():
    found = violations(last_report("sm_90", gemm), Expectations(("wgmma bf16",), blocks_per_multiprocessor=9))
    assert [text.partition(":")[0] for text in found] == ["occupancy"]


def test_matrix_instructions_other_than_those_meant_are_found():
    none = last_report("sm_90", elementwise, _copy)
    assert violations(none, Expectations(("wgmma bf16",))) == ["matrix instructions: expected wgmma bf16, got none"]
    # 16 rows are too few for a warp group.
    small = last_report("sm_90", gemm, 16, 128, 64, num_warps=4)
    assert len(violations(small, Expectations(("wgmma bf16",)))) == 2
    assert violations(small, Expectations(("mma.sync bf16",))) == []
    assert len(violations(small, Expectations(("mma.sync f16",)))) == 2
    assert len(violations(small, Expectations())) == 1
    assert violations(small, Expectations(None)) == []


def test_serialized_wgmma_is_found():
    # An accumulator of 256 registers a thread cannot stay in place.
    found = violations(last_report("sm_90", gemm, 128, 256, 32, num_warps=4, K=64), Expectations(None))
    assert any(text.startswith("warning: (C75") and "serialized" in text for text in found)


def test_an_operand_that_is_never_accessed_is_found():
    found = violations(last_report("sm_80", elementwise, _copy), Expectations(widths={"w_ptr": 16}))
    assert found == ["accesses: expected some of w_ptr, found none"]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_an_address_from_one_of_two_operands_counts_for_both(target):
    def host():
        x, z, y = (torch.empty(4096, dtype=torch.bfloat16) for _ in range(3))
        _copy_one_of_two[(4, 2)](x, z, y, 4096, 1024)

    report = last_report(target, host)
    assert {access.operand for access in report.accesses} == {"x_ptr|z_ptr", "y_ptr"}
    assert violations(report, Expectations(widths={"x_ptr": 2, "z_ptr": 2})) == []


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_an_address_that_belongs_to_no_operand_is_found(target):
    def host():
        _copy_from_address[(1,)](torch.zeros(1, dtype=torch.int64), torch.empty(1024, dtype=torch.bfloat16), 1024)

    found = violations(last_report(target, host), Expectations(widths={"y_ptr": 16}))
    assert any(text.endswith("belong to no argument") for text in found)


def test_every_launch_is_recorded_with_its_arguments():
    with capture("sm_80") as launches:
        a, b, c = gemm()
        gemm(N=1024)
        compiled = launches[0].compiled
        compiled[(3, 1, 1)](a, b, c, 1024, 512, 1024, 128, 128, 64)
    assert [launch.grid for launch in launches] == [(8, 4, 1), (8, 8, 1), (3, 1, 1)]
    assert {launch.kernel for launch in launches} == {"test_gate._gemm"}
    assert launches[0].compiled is launches[1].compiled
    assert list(launches[2].tensors) == ["a_ptr", "b_ptr", "c_ptr"]
    assert launches[2].tensors["a_ptr"] is a
    assert launches[1].arguments["N"] == 1024
    assert launches[0].constants == {"BLOCK_M", "BLOCK_N", "BLOCK_K"}
    assert (launches[0].num_warps, launches[0].num_stages) == (8, 2)


def test_a_descriptor_counts_as_its_tensor():
    with capture("sm_90") as launches:
        descriptors()
    assert [tensor.shape for tensor in launches[-1].tensors.values()] == [(1024, 1024), (512, 1024), (1024, 512)]


def test_targets_do_not_share_kernels():
    with capture("sm_80") as outer:
        gemm()
        with capture("sm_90") as inner:
            gemm()
        gemm()
    assert [launch.target.name for launch in outer] == ["sm_80", "sm_80"]
    assert ".target sm_80" in outer[1].compiled.asm["ptx"]
    assert ".target sm_90a" in inner[0].compiled.asm["ptx"]


def _state():
    package = (package_launch.target, package_launch.on)
    caches = [len(kernel.device_caches) for kernel in (_gemm, _copy, _does_not_compile)]
    return driver._active, JITFunction.run, package, caches, triton.knobs.nvidia.dump_ptxas_log


def test_nothing_of_triton_stays_changed():
    before = _state()
    with capture("sm_90") as launches:
        assert _state() != before
        gemm()
    inspect(launches[0])
    assert _state() == before


def test_nothing_stays_changed_after_an_error():
    before = _state()
    with pytest.raises(ZeroDivisionError), capture("sm_90"):
        elementwise(_copy)
        raise ZeroDivisionError
    assert _state() == before
    with pytest.raises(triton.CompilationError), capture("sm_90"):
        _does_not_compile[(1,)](torch.empty(4), 4)
    assert _state() == before


def test_a_kernel_kept_beyond_the_capture_is_not_launched():
    with capture("sm_80") as launches:
        elementwise(_copy)
        x = torch.empty(1024, dtype=torch.bfloat16)
        runner = launches[0].compiled[(1, 1, 1)]
        run = launches[0].compiled.run
    with pytest.raises(RuntimeError, match="capture that has ended"):
        run(1, 1, 1, 0, None, None, None, None, None, x, x, 1024, 1024)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            runner(x, x, 1024, 1024)
    assert len(launches) == 1


def test_the_package_is_configured_for_the_target():
    with capture("sm_89"):
        # Without a name, so that no measured configuration of a device applies.
        assert package_launch.target(torch.device("cpu")) == ("sm_86", TARGETS["sm_89"].multiprocessors, "")
    with capture("gfx942"):
        assert package_launch.target(torch.device("cpu")).arch == "gfx942"


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), capture("sm_80"):
        pass


def test_occupancy_on_amd_is_what_the_compiler_says():
    with capture("gfx942") as launches:
        gemm()
    registers = inspect(launches[0]).registers
    occupancy = int(re.search(r"; Occupancy: (\d+)", launches[0].compiled.asm["amdgcn"])[1])
    assert blocks_per_multiprocessor(TARGETS["gfx942"], 4, registers, 0, 0) == occupancy


CASES = """
import os, torch, triton, triton.language as tl
from benchmarks.gate.case import Case
from benchmarks.gate.rules import Expectations

@triton.jit
def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))

@triton.jit
def forgotten(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)))

def on(kernel, offset=0, block=1024):
    kernel[(1,)](torch.empty(2048)[offset:], torch.empty(2048), block)

CASES = [
    Case("good", lambda: (on(copy), on(copy)), subset=True),
    Case("narrow", lambda: on(copy, offset=1)),
    Case("broken", lambda: on(copy, block=1000)),
    Case("unknown", lambda: on(forgotten)),
    Case("aborts", lambda: os._exit(1)),
    Case("idle", lambda: None, targets=("sm_80",)),
    Case("elsewhere", lambda: 1 / 0, targets=("sm_90",)),
]
MEANT = {
    "gate_cases.copy": lambda launch: Expectations(widths={"x_ptr": 16, "y_ptr": 16}),
    "gate_cases.unused": lambda launch: Expectations(),
}
"""


@pytest.fixture
def gate_cases(tmp_path, monkeypatch) -> ModuleType:
    (tmp_path / "gate_cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_command_reports_and_fails(gate_cases, capsys):
    output = gate_cases / "report.json"
    arguments = ["--output", str(output), "--cases", "gate_cases", "--targets", "sm_80", "--jobs", "1"]
    assert main(arguments) == 1
    report = json.loads(output.read_text())
    found = report["violations"]
    assert len(found) == 6, found
    assert found[0].startswith("narrow, sm_80, gate_cases.copy: narrow loads of x_ptr")
    assert found[1].startswith("broken, sm_80: does not compile")
    assert found[2].startswith("unknown, sm_80, gate_cases.forgotten: nothing is said")
    assert found[3].startswith("aborts, sm_80: does not compile")
    assert found[4:] == ["idle, sm_80: expected launches, got none", "gate_cases.unused: no case launches it"]
    assert [case["case"] for case in report["cases"]] == ["good", "narrow", "broken", "unknown", "aborts", "idle"]
    assert report["cases"][0]["launches"] == [{"kernel": 0, "number": 2, "grid": [1, 1, 1]}]
    assert report["kernels"][0]["accesses"] == {"x_ptr": {"load": {"16": 2}}, "y_ptr": {"store": {"16": 2}}}
    assert re.fullmatch(r"\d+\.\d+", report["ptxas"]["sm_80"])
    assert report["provenance"]["versions"]["triton"] == triton.__version__
    table = (gate_cases / "report.md").read_text()
    assert "| gate_cases.copy | good | 4 |" in table
    assert found[0] in table
    assert found[0] in capsys.readouterr().out
    assert sorted(path.suffix for path in gate_cases.glob("*report*")) == [".json", ".md"]


def test_the_command_passes_on_a_good_subset(gate_cases):
    output = gate_cases / "report.json"
    arguments = ["--output", str(output), "--cases", "gate_cases", "--targets", "gfx942", "--jobs", "1", "--subset"]
    assert main(arguments) == 0
    report = json.loads(output.read_text())
    assert [case["case"] for case in report["cases"]] == ["good"]
    assert report["violations"] == []
