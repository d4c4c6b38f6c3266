"""What the tuner runs for each launch table: it launches what the table configures, and sees a wrong result."""

import pytest
import torch
from harness import DEVICE, interpreter_only

from neat_kernels.kernels import launch
from neat_kernels.kernels.measured import Key
from neat_kernels.tuning import plans, search
from neat_kernels.tuning.candidates import candidates, stage_of
from neat_kernels.tuning.problems import Sizes, build

SIZES = Sizes(40, 48, 56)
HALF = torch.bfloat16.itemsize
R = 16
TABLES = [table for table in launch.tables() if stage_of(table) != "gemm descriptor" or launch.has_descriptors(DEVICE)]


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.measured, "PATH", tmp_path / "none.json")
    launch.forget_measured()
    yield
    launch.forget_measured()


def key_of(table):
    target = launch.target(DEVICE)
    return Key(target.arch, target.name, table, R)


def moved(table, present):
    """A candidate with other blocks than the present configuration, small enough for an interpreter and any device."""
    tried = [one for one in candidates(table, present) if one[:3] != present[:3]]
    return min(tried, key=lambda one: one.block_m * max(1, one.block_n) * max(1, one.block_k))


@pytest.mark.parametrize("table", TABLES)
def test_a_problem_takes_its_table_and_agrees_with_a_candidate(table, monkeypatch):
    problem = build(table, R, SIZES, DEVICE)
    present = launch.config(table, DEVICE, R, HALF)
    asked = set()
    original = launch.config

    def config(stage, device, r, itemsize):
        asked.add(launch.table_name(stage, itemsize))
        return original(stage, device, r, itemsize)

    monkeypatch.setattr(launch, "config", config)
    outcome = search.search(key_of(table), present, [moved(table, present)], problem, lambda problem: lambda: 1.0, 1)
    assert table in asked
    assert outcome.dropped == {}
    assert all(result.isfinite().all() for result in problem.call(0))


@interpreter_only
@pytest.mark.parametrize("table", TABLES)
def test_one_wrong_element_of_any_result_is_seen(table):
    problem = build(table, R, SIZES, DEVICE)
    for result in problem.call(0):
        wrong = result.clone()
        wrong.view(-1)[-1:] += 1.5 * result.float().square().mean().sqrt()
        assert search.agree(result, result, problem.terms)
        assert result.numel() == 0 or not search.agree(wrong, result, problem.terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_plans_give_the_same_result(dtype):
    """measure() raises if they do not."""
    told = []
    times = plans.measure([48], dtype, DEVICE, lambda problem: lambda: 1.0, 1, told.append, tokens=40)
    assert times == {48: plans.Times(1.0, 1.0)}
    assert told == [48]
