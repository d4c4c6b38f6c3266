"""What an installation promises: a light import, typed, complete and consistent with its metadata."""

import fnmatch
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neat_kernels
from neat_kernels._version import __version__

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "typer",
    "rich",
    "matplotlib",
    "pandas",
    "pyarrow",
)


def _distribution():
    try:
        found = importlib.metadata.distribution("neat-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("neat-kernels runs from the source tree, it is not installed")
    return found


def test_import_is_light():
    code = (
        "import json, sys, torch; before = set(sys.modules); import neat_kernels; "
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, cuda_initialized = json.loads(done.stdout)
    assert "neat_kernels" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    assert not cuda_initialized


def test_public_version_is_the_installed_one():
    assert neat_kernels.__version__ == __version__
    assert _distribution().version == __version__


def test_console_script_is_the_typer_app():
    pytest.importorskip("typer")
    (script,) = [entry for entry in _distribution().entry_points if entry.name == "neat-kernels"]
    assert script.group == "console_scripts"
    assert callable(script.load())


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    if importlib.util.find_spec("setuptools") is None or _release("setuptools") < (77,):
        pytest.skip("building a wheel without a network needs setuptools 77 or newer installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("neat_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(source).as_posix() for path in (source / "neat_kernels").rglob("*.py")}
    data = {path.relative_to(source).as_posix() for path in (source / "neat_kernels" / "kernels").glob("*.json")}
    built = {name for name in packed if fnmatch.fnmatch(name, "neat_kernels/_csrc.*.so")}
    compiles = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++") is not None
    assert len(built) == compiles
    assert packed - built == sources | data | {"neat_kernels/py.typed"}


def test_constraints_are_versions_that_the_package_accepts():
    requirements = pytest.importorskip("packaging.requirements")
    declared = [requirements.Requirement(text) for text in _distribution().requires or ()]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [requirements.Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in pinned}
    assert {requirement.name for requirement in declared} - {"neat-kernels"} <= set(versions)
    for requirement in declared:
        if requirement.name != "neat-kernels":
            assert requirement.specifier.contains(versions[requirement.name]), str(requirement)


def test_torch_is_the_only_requirement_everywhere():
    requirements = pytest.importorskip("packaging.requirements")
    declared = [requirements.Requirement(text) for text in _distribution().requires or ()]
    for system, machine, expected in (
        ("Linux", "x86_64", {"torch", "triton"}),
        ("Linux", "aarch64", {"torch", "triton"}),
        ("Linux", "riscv64", {"torch"}),
        ("Darwin", "arm64", {"torch"}),
        ("Windows", "AMD64", {"torch"}),
    ):
        environment = {"platform_system": system, "platform_machine": machine, "extra": ""}
        assert {r.name for r in declared if r.marker is None or r.marker.evaluate(environment)} == expected


def _release(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:1])
