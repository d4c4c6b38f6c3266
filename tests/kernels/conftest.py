"""The kernels on a GPU, or on a CPU in Triton's interpreter: the same tests, unchanged."""

import importlib.util
from pathlib import Path

import pytest

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HERE = Path(__file__).parent
# Without Triton not even the decorators of the kernels can be imported.
collect_ignore_glob = [] if _HAS_TRITON else ["test_*.py"]

if _HAS_TRITON:
    import guards
    import harness


def pytest_collection_modifyitems(items):
    if harness.RUNS:
        return
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="set TRITON_INTERPRET=1, or run on a GPU"))


@pytest.fixture(scope="session")
def device():
    """Where the kernels run."""
    return harness.DEVICE


@pytest.fixture(autouse=True, scope="module")
def _no_small_batch():
    """Few tokens, which most tests have, show the stages of many; use_plan("small") shows those of few."""
    with pytest.MonkeyPatch.context() as patch:
        if harness.RUNS:
            patch.setattr("neat_kernels.plan.SMALL_BATCH", 0)
        yield


@pytest.fixture(autouse=True)
def _nothing_prepared():
    """A launch prepared under one test's patches is no other test's."""
    if harness.RUNS:
        from neat_kernels.kernels import bound

        bound.forget()


@pytest.fixture(autouse=True)
def _addresses():
    """No interpreted kernel of any test leaves the elements of its arguments, or has its programs race."""
    if not harness.INTERPRETED:
        yield
        return
    with guards.checked_addresses():
        yield
