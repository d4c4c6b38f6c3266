"""The tuner with a timer that knows every configuration's time, and the files that it writes and launches read."""

import inspect
import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")
from neat_kernels import cli, plan
from neat_kernels.cli import app
from neat_kernels.kernels import launch, measured
from neat_kernels.kernels.configs import Config
from neat_kernels.kernels.measured import Key
from neat_kernels.model import measured as measured_plans
from neat_kernels.tuning import TuningError, command, files, plans, problems, search, session, timing
from neat_kernels.tuning.candidates import MORE, VALUES, candidates
from neat_kernels.tuning.timing import Problem, is_faster, spread
from neat_kernels.usage import UsageError

NAME = "NVIDIA Test"
HERE = launch.Target("sm_90", 132, NAME)
CPU = torch.device("cpu")
CHAIN = Key("sm_90", NAME, "chain", 16)
SOURCE = {"command": "neat-kernels tune", "commit": "abc", "date": "2026-01-02T03:04:05+00:00", "versions": {}}


def entry(stage="chain", block_r=16, device=NAME, arch="sm_90", source=SOURCE, **config):
    present = launch.config(stage, launch.Target(arch, 132), block_r, 2)
    config = present._replace(**config)._asdict()
    return {"device": device, "arch": arch, "stage": stage, "block_r": block_r, "config": config, "source": source}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where the files are, none at first."""
    monkeypatch.setattr(measured, "PATH", tmp_path / "measured_configs.json")
    monkeypatch.setattr(measured_plans.measured_plan, "__defaults__", (tmp_path / "measured_plans.json",))
    launch.forget_measured()
    yield tmp_path
    launch.forget_measured()


def write(*entries):
    measured.PATH.write_text(json.dumps({"configurations": entries}))
    launch.forget_measured()


def every_config():
    targets = [launch.Target(arch, 132, name) for arch in ("sm_80", "sm_86", "sm_90", "gfx942") for name in ("", NAME)]
    return {
        (target, table, r): launch.config(table, target, r, 2)
        for target in (*targets, CPU)
        for table in launch.tables()
        for r in (1, 16, 17, 64, 128)
    }


class TestOverlay:
    def test_a_measurement_comes_before_the_table_and_changes_nothing_else(self):
        before = every_config()
        write(entry(block_m=32), entry("gemm fp32", 64, num_warps=4))
        changed = {place: config for place, config in every_config().items() if config != before[place]}
        assert set(changed) == {(HERE, "chain", 1), (HERE, "chain", 16), (HERE, "gemm fp32", 64)}
        assert changed[HERE, "chain", 16] == before[HERE, "chain", 16]._replace(block_m=32)
        assert launch.config("gemm", HERE, 33, 4) == changed[HERE, "gemm fp32", 64]

    def test_the_file_is_read_once_until_it_is_forgotten(self):
        before = launch.config("chain", HERE, 16, 4)
        measured.PATH.write_text(json.dumps({"configurations": [entry(block_m=32)]}))
        assert launch.config("chain", HERE, 16, 4) == before
        launch.forget_measured()
        assert launch.config("chain", HERE, 16, 4).block_m == 32

    @pytest.mark.parametrize("entries", [(), (entry(block_m=32),)], ids=["nothing", "something"])
    def test_trying_ends(self, entries):
        write(*entries)
        before = launch.config("chain", HERE, 16, 4)
        for tried in (before._replace(num_warps=2), before._replace(num_warps=8)):
            with pytest.raises(RuntimeError, match="out"), launch.trying(CHAIN, tried):
                assert launch.config("chain", HERE, 16, 4) == tried
                raise RuntimeError("out")
        assert launch.config("chain", HERE, 16, 4) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "JSON"),
            ("[]", 'an object with a list "configurations"'),
            ('{"configurations": [1]}', r"entries with device \(str\)"),
            ([entry() | {"more": 1}], r"entries with device \(str\)"),
            ([entry() | {"block_r": "16"}], r"entries with device \(str\)"),
            ([entry() | {"config": {}}], r"config with block_m \(int\)"),
            ([entry() | {"source": {"command": "x"}}], r"source with command \(str\)"),
            ([entry(persistent=1)], r"config with block_m \(int\)"),
            ([entry() | {"device": ""}], "a device that has a name"),
            ([entry() | {"arch": "interpreter"}], "arch among gfx942, sm_100"),
            ([entry() | {"stage": "apply"}], "stage among chain, columns"),
            ([entry() | {"block_r": 8}], "block_r among 16, 32, 64, 128"),
            ([entry(block_m=24)], "blocks of 0, or powers of 2"),
            ([entry(block_m=8)], "blocks of 0, or powers of 2"),
            ([entry(num_warps=3)], "num_warps among"),
            ([entry(num_stages=0)], r"num_stages in 1…8"),
            ([entry(block_n=16)], "the blocks of 'chain'"),
            ([entry(block_m=0)], "the blocks of 'chain'"),
            ([entry(persistent=True)], "persistent with stages on descriptors only"),
            ([entry(), entry(num_warps=8)], "one configuration for"),
        ],
    )
    def test_a_file_that_is_not_one_is_an_error(self, content, message):
        measured.PATH.write_text(content if isinstance(content, str) else json.dumps({"configurations": content}))
        launch.forget_measured()
        with pytest.raises(ValueError, match=rf"measured_configs\.json: expected {message}"):
            launch.config("rows", HERE, 16, 2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_candidates_are_others_that_a_file_may_hold(arch):
    for table in launch.tables():
        for r in measured.BLOCKS_R:
            present = launch.config(table, launch.Target(arch, 132), r, 2)
            tried = candidates(table, present)
            assert present not in tried
            assert 3 <= len(tried) == len(set(tried)) <= 20
            for one in tried:
                write(entry(table, r, **one._asdict()))
                assert launch.measured_configs()
    assert {name: type(values[0]) for name, values in VALUES.items()} == measured._CONFIG


def test_candidates_are_one_step_away_and_fit_into_registers():
    present = Config(16, 0, 256, 1, 1)
    assert candidates("rows fp32", present) == [
        present._replace(block_k=128),
        present._replace(num_warps=2),
        present._replace(num_stages=2),
    ]
    for one in MORE["gemm"]:
        assert one not in candidates("gemm dropout", one)
        assert {*MORE["gemm"]} - {one} <= {*candidates("gemm dropout", one)}


class Timer:
    """Seconds by configuration of the chain, the lists of several samples used up one by one."""

    def __init__(self, seconds, otherwise=9.0):
        self.seconds, self.otherwise, self.asked = seconds, otherwise, []

    def __call__(self, problem):
        config = launch.config("chain", HERE, 16, 4)

        def sample():
            self.asked.append(config)
            taken = self.seconds.get(config, self.otherwise)
            return taken.pop(0) if isinstance(taken, list) else taken

        return sample


def problem(results=lambda config: torch.ones(4)):
    return Problem(lambda i: [results(launch.config("chain", HERE, 16, 4))], 1, 100, CPU)


PRESENT = launch.config("chain", HERE, 16, 4)
FAST, SLOW, BAD = (PRESENT._replace(num_warps=warps) for warps in (2, 8, 16))


def found(timer, results=lambda config: torch.ones(4), rounds=4):
    return search.search(CHAIN, PRESENT, [SLOW, FAST, BAD], problem(results), timer, rounds)


class TestSearch:
    def test_the_fastest_is_chosen(self):
        timer = Timer({PRESENT: 3.0, SLOW: 2.0, FAST: 1.0, BAD: 4.0})
        outcome = found(timer)
        assert outcome.chosen == FAST
        assert outcome.seconds == {PRESENT: 3.0, SLOW: 2.0, FAST: 1.0, BAD: 4.0}
        # In turn, and the winner against the present one once more.
        assert timer.asked == 4 * [PRESENT, SLOW, FAST, BAD] + 4 * [PRESENT, FAST]

    def test_a_win_within_the_spread_is_none(self):
        noisy = [3.0, 3.4, 2.6, 3.0]
        assert found(Timer({PRESENT: noisy * 2, FAST: [2.9] * 8})).chosen == PRESENT
        assert found(Timer({PRESENT: [3.0] * 8, FAST: [2.9, 3.3, 2.5, 2.9] * 2})).chosen == PRESENT
        assert found(Timer({PRESENT: noisy * 2, FAST: [2.4] * 8})).chosen == FAST

    def test_luck_is_no_win(self):
        assert found(Timer({PRESENT: 3.0, FAST: [2.0] * 4 + [3.0] * 4})).chosen == PRESENT

    def test_no_candidate_is_faster(self):
        outcome = found(Timer({PRESENT: 1.0}))
        assert (outcome.chosen, outcome.dropped) == (PRESENT, {})

    def test_what_is_wrong_or_fails_is_dropped_and_told(self):
        def results(config):
            if config == BAD:
                raise RuntimeError("out of resource: shared memory\nRequired: 1")
            return torch.full((4,), 1.0 if config != FAST else 1.01)

        timer = Timer({PRESENT: 3.0, SLOW: 2.0, FAST: 1.0, BAD: 0.5})
        outcome = found(timer, results)
        assert outcome.chosen == SLOW
        assert outcome.dropped == {FAST: "wrong result", BAD: "RuntimeError: out of resource: shared memory"}
        assert not {FAST, BAD} & {*timer.asked}

    def test_the_present_one_must_run(self):
        def results(config):
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            found(Timer({}), results)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_agreement(self, dtype):
        x, y = torch.randn(64, 4096), torch.randn(4096, 64)
        exact = x.double() @ y.double()
        result = exact.to(dtype)
        reordered = (x.flip(1) @ y.flip(0)).to(dtype)
        without_a_tile = (x[:, 32:] @ y[32:]).to(dtype)
        assert search.agree(reordered, result, 4096)
        assert not search.agree(without_a_tile, result, 4096)
        hole = result.clone()
        hole[5, 7] = torch.nan
        assert not search.agree(hole, result, 4096)
        assert not search.agree(result, hole, 4096)

    def test_spread(self):
        assert spread([1.0]) == 0.0
        assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == 2.0
        assert is_faster([1.0, 1.0], than=[2.0, 2.0])
        assert not is_faster([2.0, 2.0], than=[2.0, 2.0])


@pytest.fixture
def device(monkeypatch):
    """A CPU that launches take for the device HERE, with one problem for every table."""
    monkeypatch.setattr(launch, "target", lambda place: place if isinstance(place, launch.Target) else HERE)
    monkeypatch.setattr(problems, "build", lambda table, r, sizes, device: problem())
    monkeypatch.setattr(files, "commit", lambda: "abc")
    return CPU


def tune(folder, timer, *, stages=("chain",), minutes=60.0, again=False, clock=lambda: 0.0, device=CPU):
    output = io.StringIO()
    request = command.Request(stages, True, folder, minutes, again)
    console = Console(file=output, width=200)
    came = session.Session(request, device, "neat-kernels tune", console, timer, clock).run()
    return came, output.getvalue()


def tables(came):
    return [outcome.key.stage for outcome in came.outcomes]


def written(path):
    return json.loads(path.read_text(encoding="utf-8"))["configurations"]


@pytest.mark.usefixtures("device")
class TestSession:
    def test_what_it_writes_is_what_launches_read(self, folder):
        came, output = tune(folder, Timer({PRESENT: 3e-6, FAST: 1e-6}, 9e-6))
        assert launch.config("chain", HERE, 16, 4) == FAST
        assert launch.config("chain", HERE, 32, 4) != FAST
        (one,) = written(measured.PATH)
        assert one["source"]["command"] == "neat-kernels tune"
        assert one["source"]["commit"] == "abc"
        assert one["source"]["versions"]["torch"] == torch.__version__
        assert tables(came) == ["chain"]
        assert "3.0" in output
        assert "1.0" in output
        assert [path.name for path in folder.iterdir()] == ["measured_configs.json"]

    def test_entries_of_others_stay_and_its_own_is_replaced(self, folder):
        others = [entry(device="NVIDIA Other", block_m=32), entry("rows", 64, num_warps=8)]
        write(entry(num_warps=8), *others)
        # Measured by another version: it is no reason to skip, and it is the configuration in force.
        came, _ = tune(folder, Timer({PRESENT: 1.0, SLOW: 3.0}))
        assert [outcome.present for outcome in came.outcomes] == [SLOW]
        kept = written(measured.PATH)
        assert all(other in kept for other in others)
        assert [one["config"]["num_warps"] for one in kept if measured.key_of(one) == CHAIN] == [PRESENT.num_warps]

    @pytest.mark.parametrize("other", [{"commit": "abd"}, {"versions": {"torch": "2.10"}}], ids=str)
    def test_what_another_version_measured_is_measured_again(self, other, folder):
        tune(folder, Timer({}))
        (mine,) = written(measured.PATH)
        assert tables(tune(folder, Timer({}))[0]) == []
        write(mine | {"source": mine["source"] | other})
        assert tables(tune(folder, Timer({}))[0]) == ["chain"]

    def test_an_interruption_keeps_what_is_finished_and_is_taken_up(self, folder):
        class Interrupted(Timer):
            def __call__(self, problem):
                if len(written_so_far(folder)) == 1:
                    raise KeyboardInterrupt
                return super().__call__(problem)

        with pytest.raises(KeyboardInterrupt):
            tune(folder, Interrupted({}), stages=("rows", "chain"))
        assert [one["stage"] for one in written(measured.PATH)] == ["rows"]
        came, output = tune(folder, Timer({}), stages=("rows", "chain"))
        assert tables(came) == ["rows fp32", "chain"]
        assert "1 of 3 are measured already by this version" in output
        came, _ = tune(folder, Timer({}), stages=("rows", "chain"))
        assert tables(came) == []
        came, _ = tune(folder, Timer({}), stages=("rows", "chain"), again=True)
        assert tables(came) == ["rows", "rows fp32", "chain"]

    def test_nothing_begins_after_the_time(self, folder):
        now = iter(range(0, 10**6, 100))
        came, output = tune(folder, Timer({}), stages=("rows", "chain"), minutes=2.5, clock=lambda: next(now))
        assert tables(came) == ["rows"]
        assert [str(item) for item in came.left] == ["rows fp32, r ≤ 16", "chain, r ≤ 16"]
        assert "2 items left: the same command goes on" in output

    def test_a_stage_that_fails_is_told_and_the_others_are_measured(self, folder, monkeypatch):
        def build(table, r, sizes, device):
            if table == "rows":
                raise RuntimeError("no such kernel")
            return problem()

        monkeypatch.setattr(problems, "build", build)
        with pytest.raises(TuningError, match="1 of 3 could not be measured: rows, r ≤ 16: RuntimeError: no such kern"):
            tune(folder, Timer({}), stages=("rows", "chain"))
        assert [one["stage"] for one in written(measured.PATH)] == ["chain", "rows fp32"]

    def test_a_folder_elsewhere_is_in_force_during_the_run_alone(self, folder, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / measured.PATH.name).write_text(json.dumps({"configurations": [entry(num_warps=8)]}))
        came, _ = tune(elsewhere, Timer({}))
        assert [outcome.present for outcome in came.outcomes] == [SLOW]
        assert launch.config("chain", HERE, 16, 4) == PRESENT
        assert not measured.PATH.exists()

    @pytest.mark.parametrize("path", ["missing", "file"])
    def test_a_folder_that_cannot_be_written_to(self, path, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="--output-dir must be a folder that can be written to, got"):
            tune(tmp_path / path, Timer({}))

    def test_a_file_that_is_none_of_its_own_is_refused_and_stays(self, folder):
        measured.PATH.write_text("{}")
        with pytest.raises(UsageError, match="expected an object with a list"):
            tune(folder, Timer({}))
        assert measured.PATH.read_text() == "{}"


def written_so_far(folder):
    path = folder / measured.PATH.name
    return written(path) if path.exists() else []


class TestPlans:
    @pytest.mark.parametrize(
        ("fused", "expected"),
        [
            ((1, 1, 1), 3072),
            ((3, 3, 3), 0),
            ((1, 1, 3), 2048),
            ((1, 3, 1), 3072),
            ((1, 5, 1.9), 1024),
            ((1.9, 2.1, 1), 3072),
            ((3, 1, 3), 2048),
            ((3, 1.9, 3), 0),
        ],
    )
    def test_the_limit(self, fused, expected):
        assert plans.limit({1024 * (i + 1): plans.Times(time, 2.0) for i, time in enumerate(fused)}) == expected

    def fake(self, monkeypatch, faster_up_to):
        def build(sizes, dtype, device, name):
            seconds = 1.0 if (name == "fused") == (sizes.in_features <= faster_up_to) else 2.0
            return SimpleNamespace(call=lambda i: [torch.ones(1)], terms=1, seconds=seconds)

        monkeypatch.setattr(plans, "build", build)
        return lambda problem: lambda: problem.seconds

    def test_what_is_written_is_what_the_choice_reads(self, folder, device, monkeypatch):
        other = {"device": "NVIDIA Other", "dtype": "float16", "fused_up_to": 1, "source": "someone"}
        path = folder / "measured_plans.json"
        path.write_text(json.dumps({"plans": [other]}))
        came, output = tune(folder, self.fake(monkeypatch, 2048), stages=("plans",))
        assert came.limits["bfloat16"][0] == 2048
        assert "fused up to 2048" in output
        assert other in json.loads(path.read_text())["plans"]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=NAME))
        monkeypatch.setattr(plan, "_device_obstacle", lambda device: None)
        plan.fused_limit.cache_clear()
        gpu = torch.device("cuda", 0)
        assert plan.choose_gemm(gpu, torch.bfloat16, 2048) == "fused"
        assert plan.choose_gemm(gpu, torch.bfloat16, 2049) == "cublas"
        told = plan.make_plan("triton", gpu, torch.bfloat16, torch.float32, 16, 64, 64).reason
        assert f"measured on {NAME}: neat-kernels tune, 20" in told
        assert "commit abc, torch " in told
        assert "launches as measured" not in told
        write(entry(), entry("rows", source=SOURCE | {"date": "2025-12-31T00:00:00+00:00"}))
        told = plan.make_plan("triton", gpu, torch.float32, torch.float32, 16, 64, 64).reason
        assert told.endswith(f"; launches as measured on {NAME}, 2026-01-02")
        plan.fused_limit.cache_clear()

    def test_they_are_taken_again_after_new_configurations_alone(self, folder, device, monkeypatch):
        timer = self.fake(monkeypatch, 2048)
        assert set(tune(folder, timer, stages=("plans",))[0].limits) == {"bfloat16"}
        assert tune(folder, timer, stages=("plans",))[0].limits == {}

        def either(problem):
            return lambda: getattr(problem, "seconds", 1.0)

        came, _ = tune(folder, either, stages=("chain", "plans"))
        assert set(came.limits) == {"bfloat16"}
        # As after an interruption between the two: the configuration is done, and newer than the plan.
        today = written(measured.PATH)[0]["source"]
        write(entry(source=today | {"date": "2999-01-01T00:00:00+00:00"}))
        came, _ = tune(folder, either, stages=("chain", "plans"))
        assert (tables(came), set(came.limits)) == ([], {"bfloat16"})

    def test_plans_that_disagree_are_not_timed(self, monkeypatch):
        def build(sizes, dtype, device, name):
            return SimpleNamespace(call=lambda i: [torch.full((2,), float(name == "fused"))], terms=1)

        monkeypatch.setattr(plans, "build", build)
        with pytest.raises(RuntimeError, match="expected the plans fused and cublas to agree at a reduction of 512"):
            plans.measure([512], torch.bfloat16, CPU, lambda problem: lambda: 1.0, 1)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", *map(str, arguments)])


class TestCommand:
    def test_a_dry_run_lists_and_runs_nothing(self, monkeypatch, folder):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = run("--dry-run")
        assert result.exit_code == 0, result.output
        for table in launch.tables():
            assert f"{table}, r ≤ 128" in result.output
        for word in ("a device of sm_90, since there is none here", "nothing was run", "plans in float16", "about"):
            assert word in result.output
        quick = run("--dry-run", "--quick", "--stage", "down", "--stage", "plans").output
        listed = [line.split("  ")[1] for line in quick.splitlines() if "r ≤" in line or "plans in" in line]
        assert listed == ["down, r ≤ 16", "down fp32, r ≤ 16", "plans in bfloat16"]
        for option in (("--again",), ("--minutes", "3"), ("--output-dir", folder)):
            refused = run("--dry-run", *option)
            assert refused.exit_code == 2
            assert f"expected no {option[0]}" in refused.output
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "expected a CUDA or ROCm device, found none"),
            (("--stage", "gem", "--dry-run"), "--stage must be among gemm, gemm-descriptor"),
            (("--minutes", "0"), "--minutes must be above 0"),
            (("--minutes", "nan"), "--minutes must be above 0"),
        ],
    )
    def test_refused(self, arguments, message, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output

    def test_every_stage_can_be_asked_for(self):
        named = command.items(command.Request(command.STAGES, False, None, 1.0, False), HERE)
        assert {item.table for item in named if not item.is_plan} == {*launch.tables()}
        on_ampere = command.items(command.Request(command.STAGES, False, None, 1.0, False), launch.Target("sm_80", 1))
        assert not any("descriptor" in item.table for item in on_ampere)
        told = inspect.signature(cli.tune).parameters["stage"].annotation
        assert all(re.search(rf"\b{stage}\b", str(told)) for stage in command.STAGES)

    def test_a_failure_ends_with_its_status(self, folder, device, monkeypatch):
        def build(*arguments):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(problems, "build", build)
        monkeypatch.setattr(command, "_device", lambda: CPU)
        result = run("--stage", "chain", "--quick", "--output-dir", folder)
        assert result.exit_code == 1, result.output
        assert "1 of 1 could not be measured: chain, r ≤ 16: RuntimeError: no such kernel" in result.output


@pytest.mark.gpu
def test_on_a_gpu(folder):
    """The real timer, on what is small: every configuration has a time, and what was chosen is in force."""
    device = torch.device("cuda", torch.cuda.current_device())
    came, _ = tune(folder, timing.prepare, stages=("chain", "finish"), device=device)
    assert tables(came) == ["finish", "finish fp32", "chain"]
    for outcome in came.outcomes:
        assert all(0 < seconds < 1 for seconds in outcome.seconds.values())
        assert launch.config(outcome.key.stage, device, 16, 2) == outcome.chosen


@pytest.mark.gpu
def test_plans_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    times = plans.measure([512], torch.bfloat16, device, timing.prepare, 2)
    assert 0 < times[512].fused < 1
    assert 0 < times[512].cublas < 1


def test_the_commit_of_a_tree_without_git(monkeypatch):
    monkeypatch.setattr(files, "_git", lambda folder, *arguments: None)
    monkeypatch.delenv("NEAT_KERNELS_COMMIT", raising=False)
    assert files.commit() == "unknown"
    monkeypatch.setenv("NEAT_KERNELS_COMMIT", "abc")
    assert files.commit() == "abc"
