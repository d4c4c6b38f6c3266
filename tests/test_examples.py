"""Every example runs by itself, in a fresh process, and prints what it found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 80


def run(script: Path, folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    # One thread: the examples are small, and other tests run beside them.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",
    }
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


def test_the_sharded_example_runs_in_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(ROOT / "examples" / "06_fully_shard.py", tmp_path, *launcher)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_is_short_and_checks_what_it_says(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) < MAX_LINES
    assert "assert " in source


def test_a_failing_script_is_noticed(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import neat_kernels\nassert not neat_kernels.__version__\n", encoding="utf-8")
    assert "AssertionError" in run(script, tmp_path).stderr
