import gc
import os

import pytest
import torch
from hypothesis import settings

# Deterministic draws: a failing example fails on every machine, not on one run in a hundred.
settings.register_profile("repo", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repo"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with torch's default each would spin on all of them.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def frozen_garbage():
    """Garbage is collected among what the tests make: the Trainer collects at every start, mostly what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["native", "blocks"])
def base_gemm(request, monkeypatch):
    """Run a test on both plans of the CPU's half GEMM, whichever this machine would choose."""
    from neat_kernels.torch_backend import low_rank

    blocks = request.param == "blocks"
    monkeypatch.setattr(
        low_rank, "casts_blocks", lambda device, dtype: blocks and dtype in (torch.float16, torch.bfloat16)
    )
    return request.param
