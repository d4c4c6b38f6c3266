"""Run PEFT's own PEANuT tests on our layers: python tests/peft_suite CHECKOUT

CHECKOUT is a source tree of PEFT with its tests, and both are taken from it. The tests run three times: on PEFT as it
is, with accelerate() in place, and with NEAT in PEANuT's place. Whatever passes on PEFT as it is must pass on ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

FILES = ("tests/test_custom_models.py", "tests/test_initialization.py", "tests/test_config.py")
# The first release in which NEAT's files can be what they are.
NEAT_NEEDS = (0, 21)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="source tree of a PEFT release")
    parser.add_argument("-k", default="Peanut", help="which tests, as pytest's -k (default: Peanut)")
    arguments = parser.parse_args()
    missing = [name for name in FILES if not (arguments.checkout / name).is_file()]
    if missing:
        parser.error(f"expected PEFT's source tree with its tests, found no {missing[0]} in {arguments.checkout}")
    results = {"stock": run(arguments.checkout, "stock", arguments.k)}
    release = results["stock"]["peft"]
    for mode in ("accelerate", "config") if tuple(map(int, release.split(".")[:2])) >= NEAT_NEEDS else ("accelerate",):
        results[mode] = run(arguments.checkout, mode, arguments.k)
    return compare(results)


def run(checkout: Path, mode: str, chosen: str) -> dict:
    """The outcomes of the tests in one mode, in a process of their own."""
    here = Path(__file__).resolve().parent
    checkout = checkout.resolve()
    path = os.pathsep.join(map(str, (checkout / "src", here, here.parents[1])))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--tb=no", "-W", "ignore"]
        command += ["-p", "neat_in_peft", "--neat", mode, "--outcomes", str(outcomes), "-k", chosen, *FILES]
        finished = subprocess.run(command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, check=False)
        if finished.returncode not in (0, 1):
            sys.exit(f"pytest ended with {finished.returncode} in mode {mode}: no outcome")
        return json.loads(outcomes.read_text())


def compare(results: dict) -> int:
    """Print what became of the tests, and return 1 unless ours pass wherever PEFT's own layers do."""
    stock = results["stock"]["outcomes"]
    bad = 0
    for mode, result in results.items():
        outcomes = result["outcomes"]
        worse = [test for test, outcome in stock.items() if outcome == "passed" and outcomes.get(test) != "passed"]
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(outcomes.values()).items()))
        print(f"PEFT {result['peft']}, {mode}: {counts}; layers: {result['layers']}")
        for test in worse:
            print(f"  passes on PEFT's own layers, not here: {test} ({outcomes.get(test, 'not collected')})")
        bad += len(worse) + (mode != "stock" and not result["layers"]["fused"])
    return int(bad > 0 or not stock)


if __name__ == "__main__":
    sys.exit(main())
