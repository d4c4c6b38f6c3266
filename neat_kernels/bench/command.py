"""`neat-kernels bench`: what it is asked, what it measures, and what it writes."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from tqdm import tqdm  # type: ignore[import-untyped]

from neat_kernels.bench import BenchError
from neat_kernels.bench.compare import compare
from neat_kernels.bench.measure import Mode
from neat_kernels.bench.presets import PRESETS, Preset, cases, dtypes_of, layers_of
from neat_kernels.bench.processes import Case, fresh_processes, is_sound, summarize
from neat_kernels.bench.provenance import cpu_name, gpu_name, provenance, write_json
from neat_kernels.bench.report import print_comparison, print_facts, print_results, print_skipped
from neat_kernels.bench.results import Results, read_results
from neat_kernels.bench.shapes import LayerShape, parse_shapes
from neat_kernels.interrupt import Interrupted
from neat_kernels.usage import UsageError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Request:
    """What to measure: cases, over how many processes and within what time, where to write, and what is left out."""

    cases: list[Case]
    preset: Preset
    json: Path
    left_out: str = ""


def run(options: Mapping[str, Any], console: Console) -> None:
    """Answer the command's options, of which those that were not given are None.

    Raises:
        UsageError: an option is malformed, or would have no effect.
        BenchError: a contender was wrong or failed, or a process ended without results.
        Interrupted: the user stopped; what was whole is written.
    """
    if options["plan"] is not None:
        raise UsageError("--plan is read with --model only, which was not given")
    old = None if options["compare"] is None else _read(options["compare"])
    if options["measured"] is not None:
        _compare_files(options, old, console)
        return
    request = _request(options) if old is None else _again(options, old)
    after = _measure(request, console)
    if old is not None:
        _print_compared(old, after, console)


def _read(path: Path) -> Results:
    try:
        return read_results(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _compare_files(options: Mapping[str, Any], old: Results | None, console: Console) -> None:
    if old is None:
        raise UsageError("--measured is read with --model or --compare, of which neither was given")
    _refuse(options, ("preset", "device", "shape", "r", "dtype", "threads", "json", "overwrite"), "with --measured")
    _print_compared(old, _read(options["measured"]), console)


def _refuse(options: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    given = [name for name in names if options[name] not in (None, False)]
    if given:
        what = "a preset" if given[0] == "preset" else f"--{given[0]}"
        raise UsageError(f"{what} is not read {where}: the file says what was measured")


def _print_compared(old: Results, new: Results, console: Console) -> None:
    try:
        print_comparison(compare(old, new), console)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _request(options: Mapping[str, Any]) -> Request:
    name = options["preset"] or "quick"
    if name not in PRESETS:
        raise UsageError(f"the preset must be one of {', '.join(PRESETS)}; got {name!r}")
    preset = PRESETS[name]
    device = _device(options["device"])
    if options["dtype"] is not None and options["dtype"] not in _DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(_DTYPES)}; got {options['dtype']!r}")
    dtypes = dtypes_of(device) if options["dtype"] is None else (_DTYPES[options["dtype"]],)
    if options["shape"]:
        shapes = [_parse(text, options["r"]) for text in options["shape"]]
        modes: tuple[Mode, ...] = ("training", "inference")
        layers = [(mode, shape) for mode in modes for shape in shapes]
    elif options["r"] is not None:
        raise UsageError("--r is read with --shape only, which was not given")
    else:
        layers = layers_of(name, device)
    threads = _threads(options["threads"])
    left_out = ""
    if options["dtype"] is None and device.type == "cpu" and "bfloat16" not in dtypes:
        left_out = "bf16 is left out: this CPU has no product of bf16 matrices in hardware (--dtype bf16 measures it)"
    return Request(cases(layers, dtypes, device, threads, preset), preset, _file(options, name), left_out)


def _again(options: Mapping[str, Any], old: Results) -> Request:
    """The cases of an earlier result, over as many processes as it had."""
    _refuse(options, ("preset", "device", "shape", "r", "dtype", "threads"), "with --compare")
    here = gpu_name() if any(case["device"] != "cpu" for case in old.cases) else cpu_name()
    if here != old.provenance["device"]:
        raise UsageError(
            f"--compare must be a result of {here or 'a CPU'}, of {old.provenance['device']} nothing can run here"
        )
    kept = ("mode", "shape", "dtype", "device", "threads", "seconds", "contenders")
    asked = [{key: case[key] for key in kept} | {"block": case.get("block", "")} for case in old.cases]
    processes = max((len(case["runs"]) for case in old.cases), default=0)
    if not processes:
        raise UsageError(f"--compare must be a file with results, {options['compare']} has none")
    preset = Preset(processes, 0.0, PRESETS["full"].limit, apart=True, contenders=())
    return Request(asked, preset, _file(options, "again"))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be cpu or cuda without --model; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda without --model; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} finds no CUDA device")
    return device


def _threads(given: int | None) -> int:
    threads = torch.get_num_threads() if given is None else given
    if threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    return threads


def _parse(text: str, r: int | None) -> LayerShape:
    if r is not None and r < 1:
        raise UsageError(f"--r must be at least 1, got {r}")
    if not re.fullmatch(r"(\d+x\d+x\d+)|(.+@\d+)", text, re.ASCII):
        raise UsageError(f"--shape must be TOKENSxINxOUT or LAYER@TOKENS, such as llama-3-8b.q_proj@16; got {text!r}")
    try:
        (shape,) = parse_shapes(f"{text}x{r or 16}")
    except ValueError as error:
        raise UsageError(f"--shape: {error}") from error
    return shape


def _file(options: Mapping[str, Any], name: str) -> Path:
    given: Path | None = options["json"]
    if given is None:
        if options["overwrite"]:
            raise UsageError("--overwrite is read with --json only, which was not given")
        return Path(f"neat-bench-{name}-{datetime.now():%Y%m%d-%H%M%S}.json")
    if not given.parent.is_dir() or given.is_dir():
        raise UsageError(f"--json must be a file in a folder that is there, got {given}")
    if given.exists() and not options["overwrite"]:
        raise UsageError(f"--json {given} is there already: choose another, or add --overwrite")
    return given


def _measure(request: Request, console: Console) -> Results:
    """Measure, print and write; a file holds whole cases only, and is written anew after each group of them."""
    facts = provenance()
    print_facts(facts, request.cases[0]["threads"], console)
    if request.left_out:
        console.print(request.left_out, highlight=False)
    preset = request.preset
    deadline = time.monotonic() + preset.limit
    groups = [[case] for case in request.cases] if preset.apart else [request.cases]
    done: list[Case] = []
    total = len(request.cases) * preset.processes
    with tqdm(total=total, unit="case", disable=not sys.stderr.isatty()) as bar:
        try:
            for group in groups:
                runs = fresh_processes(group, preset.processes, deadline, lambda case: bar.update(), quiet=True)
                done += [
                    {**case, "runs": own, "summary": summarize(own)}
                    for case, own in zip(group, runs, strict=True)
                    if own
                ]
                content = {"provenance": facts, "processes": preset.processes, "cases": done}
                write_json(request.json, content)
        except KeyboardInterrupt as error:
            kept = f"{request.json} has the {len(done)} cases that were whole" if done else "nothing was whole"
            raise Interrupted(f"Stopped; {kept}.") from error
    print_results(done, console)
    print_skipped(done, console)
    _print_end(request, done, console)
    if not all(is_sound(case["runs"]) for case in done):
        raise BenchError(f"a contender was wrong or failed, see above; the others' times are in {request.json}")
    return Results(facts, json.loads(json.dumps(done)))


def _print_end(request: Request, done: Sequence[Case], console: Console) -> None:
    fewest = min((len(case["runs"]) for case in done), default=0)
    if len(done) < len(request.cases) or fewest < request.preset.processes:
        console.print(
            f"The limit of {request.preset.limit:g} s was reached: {len(done)} of {len(request.cases)} cases ran, in "
            f"{fewest} of {request.preset.processes} processes at least."
        )
    console.print(f"Written: {escape(str(request.json))}", highlight=False, soft_wrap=True)
