"""The measurements of a CPU: layers, decoding, a block and whole models, as JSON in one folder.

    python -m benchmarks.cpu_suite [PART...]      default: every part

Repeated, it goes on where it stopped, on the same day or with --output-dir; --minutes bounds one call. It takes hours
in all, on a machine that does nothing else meanwhile. A summary comes last.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.models import MODELS
from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.provenance import ROOT, cpu_name

_LAYER, _MODEL = ["-m", "benchmarks.layer_ratio"], ["-m", "benchmarks.model_step"]
_ALL = [name for name, contender in CONTENDERS.items() if not contender.alone]
_FEW = ["frozen", "neat", "accelerated", "peft_lora", "peft_peanut"]
_HALF = [*_FEW, "neat_half", "peft_lora_half"]
_MODEL_NAME = "llama-3.2-3b-2-layers"
assert _MODEL_NAME in MODELS

# What the parts run; --threads, --processes and the file are added.
PARTS: dict[str, list[str]] = {
    # Every way to run the layer at eight shapes of the registry; in inference only LoRA has cached factors as ours do.
    **{
        f"layers-{mode}-{short}": [
            *_LAYER, "--shapes", "cpu-eight", "--modes", mode, "--dtypes", dtype, "--seconds", "0.5",
            "--contenders", *contenders,
        ]
        for mode, contenders in (("training", _ALL), ("inference", [*_HALF, "formula"]))
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    },
    "decoding": [*_LAYER, "--shapes", "decoding-1b", "--modes", "inference", "--contenders", *_HALF],
    # What the overhead is drawn against.
    "tokens": [*_LAYER, "--shapes", "cpu-tokens", "--seconds", "1", "--contenders", *_FEW],
    "widths": [*_LAYER, "--shapes", "cpu-widths", "--seconds", "1", "--contenders", *_FEW],
    "block": [*_LAYER, "--blocks", "llama-3.2-1b@512", "--contenders", *_HALF],
    **{
        f"model-{targets}-{short}": [*_MODEL, "--model", _MODEL_NAME, "--targets", targets, "--dtype", dtype]
        for targets in ("default", "all-linear")
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print a summary; 1 if one failed or is not complete."""
    options = _parse(arguments)
    folder: Path = options.output_dir
    deadline = time.monotonic() + 60 * options.minutes
    outcomes = {}
    for part in options.parts or PARTS:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            outcomes[part] = "not begun: no time left"
            continue
        print(f"=== {part}", flush=True)
        outcomes[part] = _run(part, folder, remaining, options)
    print(f"=== summary, results in {folder}")
    for part, outcome in outcomes.items():
        print(f"{part:28}{outcome}")
    return 0 if all(outcome == "complete" for outcome in outcomes.values()) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process (default: 2)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes of each figure (default: 5)")
    parser.add_argument("--minutes", type=float, default=12 * 60, help="begin no process after so many (default: 720)")
    parser.add_argument("--output-dir", type=Path, help="default: benchmarks/results/DATE-CPU")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts among {', '.join(PARTS)}; got {unknown[0]!r}")
    if options.output_dir is None:
        device = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
        options.output_dir = ROOT / "benchmarks" / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-{device}"
    return options


def _run(part: str, folder: Path, seconds: float, options: argparse.Namespace) -> str:
    """Run or go on with a part, and say how that ended."""
    output = folder / f"{part}.json"
    try:
        shown = output.relative_to(ROOT)
    except ValueError:
        shown = output
    command = [sys.executable, *PARTS[part], "--threads", str(options.threads), "--processes", str(options.processes)]
    command += ["--output", str(shown), "--resume", "--limit", f"{seconds:.0f}"]
    done = subprocess.run(command, cwd=ROOT)
    return "complete" if done.returncode == 0 else f"failed or not complete (exit status {done.returncode})"


if __name__ == "__main__":
    sys.exit(main())
