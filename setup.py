"""The project is described in pyproject.toml; here is what that file cannot say: how csrc is built, and where.

csrc is plain C++ behind a C interface: it needs a compiler, neither torch nor Python, and fits every version of both.
Where there is no compiler the package goes without, and `neat-kernels env` says so.
"""

import platform
import sys

from setuptools import Extension, setup

SOURCES = ["csrc/rows_times.cpp", "csrc/transposed_times.cpp"]
# neat_kernels/cpu.py loads it only where the CPU has these.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


def extensions() -> list[Extension]:
    """csrc on the platform that it is written for, else nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    return [
        Extension(
            "neat_kernels._csrc",
            SOURCES,
            depends=["csrc/lanes.h"],
            # GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
            extra_compile_args=["-std=c++17", "-O3", *AVX512, "-Wno-maybe-uninitialized"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
