"""The package's kernels pass the compile gate: its quick cases here, all of them in `make gate`."""

import importlib
import pkgutil

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
    import neat_kernels.kernels

    names = [module.name for module in pkgutil.iter_modules(neat_kernels.kernels.__path__)]
    modules = [importlib.import_module(f"neat_kernels.kernels.{name}") for name in names]
    kernels = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and getattr(value, "__module__", "") == module.__name__
    }
    assert set(load(CASES).MEANT) == kernels
