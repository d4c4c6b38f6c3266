"""The numbers with the tiles of every device of the launch table, which on a CPU only the interpreter can run."""

import pytest
import torch
from harness import check, draw, interpreter_only, use_plan, use_seed

from neat_kernels.kernels import launch
from neat_kernels.kernels.configs import CONFIGS

ARCHS = sorted({arch for by_arch in CONFIGS.values() for arch in by_arch} - {"default", "interpreter"})
HALF, SINGLE = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def tiles(arch):
    """What the interpreter sees of an arch: neither warps nor stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "target", lambda device: launch.Target(arch, 132))
        configs = [launch.config(stage, CPU, r, 2)[:3] for stage in CONFIGS for r in (16, 32, 64, 128)]
        return (*configs, launch.low_rank_first(CPU), launch.has_descriptors(CPU))


DIFFERENT = list({tiles(arch): arch for arch in reversed(ARCHS)}.values())


def pretend(monkeypatch, arch, plan="fused"):
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(arch, 132))
    use_plan(monkeypatch, plan)


@interpreter_only
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((137, 263, 70, 16), HALF, {}),
        ((137, 264, 72, 16), HALF, {}),
        ((137, 140, 139, 64), HALF, {"orientation": "in", "depth": 1}),
        ((70, 139, 131, 33), torch.float16, {"compute_dtype": SINGLE, "adapter_dtype": SINGLE}),
        ((133, 70, 263, 8), SINGLE, {"orientation": "in", "depth": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", DIFFERENT)
def test_tiles_of_every_device(arch, shape, dtype, options, monkeypatch):
    case = draw(*shape, dtype=dtype, **options)
    pretend(monkeypatch, arch)
    check(case)


@interpreter_only
@pytest.mark.parametrize(("shape", "dtype"), [((137, 70, 135, 16), HALF), ((70, 37, 135, 40), SINGLE)], ids=str)
@pytest.mark.parametrize("plan", ["fused", "cublas"])
@pytest.mark.parametrize("arch", DIFFERENT)
def test_tiles_under_dropout(arch, plan, shape, dtype, monkeypatch):
    case = draw(*shape, dtype=dtype)
    use_seed(monkeypatch, case, 0.3)
    pretend(monkeypatch, arch, plan)
    check(case, plan=plan)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_stage_has_tiles_that_tl_dot_takes(arch, monkeypatch):
    pretend(monkeypatch, arch)
    for stage in CONFIGS:
        for r in (1, 32, 33, 64, 128):
            for itemsize in (2, 4):
                config = launch.config(stage, CPU, r, itemsize)
                assert config.block_m >= 16
                assert all(block % 16 == 0 for block in (config.block_n, config.block_k))
