"""The package's kernels pass the compile gate: its quick cases here, all of them in `make gate`."""

import pytest

pytest.importorskip("triton")
import triton

from benchmarks.gate.case import load, run
from benchmarks.gate.targets import TARGETS

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are never compiled")

CASES = "benchmarks.gate.cases"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [case.name for case in load(CASES).CASES if case.subset])
def test_kernels_compile_to_what_was_meant(case, target):
    result = run(CASES, case, target)
    assert result["launches"]
    assert not result["violations"]


def test_every_kernel_of_the_package_is_in_the_gate():
    from neat_kernels.kernels import branch, down, down_backward, features, features_backward, gemm, reduce, up_backward

    modules = (branch, down, down_backward, features, features_backward, gemm, reduce, up_backward)
    kernels = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and getattr(value, "__module__", "") == module.__name__
    }
    assert set(load(CASES).MEANT) == kernels
