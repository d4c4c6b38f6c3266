"""A training step of a whole model: ours, PEFT's LoRA and PEANuT, the frozen model and full fine-tuning.

    python -m benchmarks.model_step --output FILE.json

Each contender runs in a process of its own, and must give the frozen model's loss before it is timed, its B being zero.
A step is forward, backward and AdamW over what is trained; of the frozen model forward and backward to the embeddings.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import ALL_LINEAR, MODELS, Model
from neat_kernels.bench.provenance import ROOT, provenance, write_json
from neat_kernels.finetune.memory import peak_of_step

_WARM_UP = 2
# Of the loss, whose own size is about log(vocabulary); bf16 carries 8 bits through every layer.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def main(arguments: list[str] | None = None) -> int:
    """Run the contenders, print their table, write the results; 1 if one was wrong or failed."""
    options = _parse(arguments)
    if options.worker:
        print(json.dumps(_measure(options.worker, options)))
        return 0
    facts = provenance()
    print(f"{facts['device']}, {options.threads} CPU threads, commit {facts['commit']}")
    model = MODELS[options.model]
    print(f"{options.model}, {options.targets}, r={model.r}, {model.batch} × {model.length} tokens, {options.dtype}")
    print(f"{'':24}{'trained':>12}{'ms/step':>10}{'/ frozen':>10}{'tokens/s':>10}{'peak, MiB':>11}")
    runs: dict[str, Any] = {}
    for name in options.contenders:
        runs[name] = _fresh_process(name, options)
        _print(name, runs, model)
        if options.output is not None:
            case = {"model": options.model, "targets": options.targets, "dtype": options.dtype}
            write_json(options.output, {"provenance": facts, **case, "steps": options.steps, "runs": runs})
    return 1 if any("failed" in run for run in runs.values()) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-4x1024")
    parser.add_argument("--targets", choices=["default", "all-linear"], default="default")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=list(_TOLERANCE), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contender (default: 5)")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no CUDA device")
    return options


def _fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.model_step", "--worker", name]
    for option in ("model", "targets", "dtype", "device", "threads", "steps"):
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"failed": next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _print(name: str, runs: dict[str, Any], model: Model) -> None:
    run = runs[name]
    if "failed" in run:
        print(f"{name:24}failed: {run['failed']}", flush=True)
        return
    ms = statistics.median(run["ms"])
    floor = statistics.median(runs["frozen"]["ms"]) if "ms" in runs.get("frozen", {}) else math.nan
    peak = "–" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:,.0f}"
    print(
        f"{name:24}{run['trained']:12,}{ms:10.1f}{ms / floor:10.2f}{1e3 * model.tokens / ms:10,.0f}{peak:>11}",
        flush=True,
    )


def _frozen(model: Any, settings: Model, targets: list[str]) -> Any:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def _full(model: Any, settings: Model, targets: list[str]) -> Any:
    return model


def _neat(model: Any, settings: Model, targets: list[str]) -> Any:
    import neat_kernels as nk

    return nk.apply_neat(model, nk.NeatConfig(r=settings.r, target_modules=targets))


def _peft_lora(model: Any, settings: Model, targets: list[str], autocast_adapter_dtype: bool = True) -> Any:
    import peft

    config = peft.LoraConfig(r=settings.r, lora_alpha=settings.r, target_modules=targets, bias="none")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


def _peft_lora_half(model: Any, settings: Model, targets: list[str]) -> Any:
    return _peft_lora(model, settings, targets, autocast_adapter_dtype=False)


def _peft_peanut(model: Any, settings: Model, targets: list[str]) -> Any:
    import peft

    config = peft.PeanutConfig(r=settings.r, depth=0, act_fn="relu", scaling=1.0, target_modules=targets)
    return peft.get_peft_model(model, config)


CONTENDERS: dict[str, Callable[[Any, Model, list[str]], Any]] = {
    "frozen": _frozen,
    "neat": _neat,
    "peft_lora": _peft_lora,
    "peft_lora_half": _peft_lora_half,
    "peft_peanut": _peft_peanut,
    "full": _full,
}


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, check and time one contender in this process."""
    torch.set_num_threads(options.threads)
    settings, device = MODELS[options.model], torch.device(options.device)
    model = settings.build(getattr(torch, options.dtype), device)
    targets = list(ALL_LINEAR if options.targets == "all-linear" else settings.targets)
    shape = (settings.batch, settings.length)
    ids = torch.randint(settings.config["vocab_size"], shape, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    model = CONTENDERS[name](model, settings, targets).train()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    if not abs(loss - expected) <= _TOLERANCE[options.dtype] * expected:
        raise RuntimeError(f"expected the frozen model's loss {expected:.6f}, B being zero, got {loss:.6f}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.nn.Parameter(torch.zeros(1))], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(_WARM_UP):
        step()
    ms = [_timed(step, ids) for _ in range(options.steps)]
    peak = peak_of_step(step, model, optimizer)
    return {"trained": sum(p.numel() for p in trained), "ms": ms, "peak_bytes": peak, "loss": loss}


def _timed(step: Callable[[], None], ids: Tensor) -> float:
    """Milliseconds of a step, the device's part of it waited for."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
