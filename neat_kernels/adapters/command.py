"""neat-kernels inspect, export and merge: adapter folders from the command line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from neat_kernels.adapters.base_model import load_base
from neat_kernels.adapters.description import CONFIG_FILE, FILES, checked_config, read_config
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.folder import check_destination, whole_folder
from neat_kernels.adapters.load import load_adapter
from neat_kernels.adapters.lora_export import export_lora
from neat_kernels.adapters.lora_import import check_lora
from neat_kernels.adapters.names import LORA, NEAT, PEANUT
from neat_kernels.adapters.save import METADATA
from neat_kernels.adapters.swap import merge_neat
from neat_kernels.adapters.weights import Weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SILENT = ("peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "init_weights")


def inspect(folder: Path, console: Console) -> None:
    """Print what an adapter folder holds, having read every value of it.

    Raises:
        AdapterError: a file is missing or broken, or a value is not finite.
    """
    values = read_config(folder, (PEANUT, NEAT, LORA))
    if values["peft_type"] != LORA:
        checked_config(folder, values)
    with Weights(folder) as weights:
        shapes, norms = weights.shapes, {name: weights.read_any(name).norm().item() for name in weights.shapes}
        metadata = weights.own_metadata(METADATA)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("type", values["peft_type"])
    facts.add_row("base", printable(values.get("base_model_name_or_path") or "not recorded"))
    facts.add_row("loaded by", _readers(folder, values))
    for name, value in values.items():
        if name not in _SILENT and value not in (None, False, [], {}, ""):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            facts.add_row(printable(name), printable(text))
    facts.add_row("parameters", f"{sum(torch.Size(shape).numel() for shape in shapes.values()):,}")
    if metadata:
        hashes = len(metadata.get("base") or ())
        facts.add_row("written by", f"neat-kernels {metadata.get('version')}, with the hashes of {hashes} base weights")
    console.print(facts)
    console.print(_tensors(shapes, norms))


def export(
    folder: Path, output: Path, model: str | None, pad_to: str | None, overwrite: bool, console: Console
) -> None:
    """Write an adapter as LoRA.

    Raises:
        AdapterError: the adapter, the base model or the output is not as it must be; nothing is written then.
    """
    check_destination(output, overwrite, FILES)
    rank = int(pad_to) if pad_to is not None and pad_to.isdecimal() and int(pad_to) > 0 else pad_to
    exported = export_lora(_adapted(folder, model, "auto"), output, pad_to=rank, overwrite=overwrite)
    console.print(escape(str(exported)), soft_wrap=True, highlight=False)
    console.print(
        escape(f'Loaded by peft.PeftModel.from_pretrained(model, "{output}")'), soft_wrap=True, highlight=False
    )


def merge(
    folder: Path, output: Path, model: str | None, rounding: str, seed: int | None, dtype: str | None, console: Console
) -> None:
    """Write the base model with the adapter merged into its weights, and its tokenizer if it has one.

    Raises:
        AdapterError: the adapter, the base model or the output is not as it must be, or the layers cannot be rounded
            as asked; nothing is written then.
    """
    check_destination(output, False, ())
    values = read_config(folder)
    target = _dtype(dtype)
    adapted = _adapted(folder, model, "auto")
    if target is not None and target.itemsize > next(adapted.parameters()).dtype.itemsize:
        # W is exact in the wider dtype, W + ΔW is not in the narrower one.
        adapted.to(target)
    try:
        merged = merge_neat(adapted, rounding=rounding, seed=seed).to(target)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    tokenizer = _tokenizer(model or values.get("base_model_name_or_path"))
    with whole_folder(output) as temporary:
        merged.save_pretrained(temporary)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    console.print(
        escape(f'{output}: loaded by transformers.{type(merged).__name__}.from_pretrained("{output}")'),
        soft_wrap=True,
        highlight=False,
    )


def _adapted(folder: Path, model: str | None, dtype: torch.dtype | str) -> nn.Module:
    values = read_config(folder)
    checked_config(folder, values)
    return load_adapter(load_base(folder, values, model, dtype), folder)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in _DTYPES:
        raise AdapterError(f"--dtype: expected {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _tokenizer(location: Any) -> Any:
    """The tokenizer or processor that lies beside the base, if there is one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError):
        return None


def _readers(folder: Path, values: Mapping[str, Any]) -> str:
    own, peft = "neat_kernels.load_adapter", "peft.PeftModel.from_pretrained"
    if values["peft_type"] != LORA:
        return own if values["peft_type"] == NEAT else f"{own}, {peft}"
    try:
        check_lora(folder / CONFIG_FILE, values)
    except AdapterError as error:
        return printable(f"{peft} alone; {error}")
    return f"neat_kernels.from_lora, {peft}"


def printable(value: object) -> str:
    """Text of a file for a terminal: without markup, and without characters that control it."""
    return escape("".join(c if c.isprintable() else "?" for c in str(value)))


def _tensors(shapes: Mapping[str, tuple[int, ...]], norms: Mapping[str, float]) -> Table:
    """One row for all tensors of one name and shape: how many, and the span of their norms."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("tensor")
    for column in ("shape", "number", "norm"):
        table.add_column(column, justify="right")
    alike: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    for name, shape in shapes.items():
        alike[_kind(name), shape].append(norms[name])
    for (kind, shape), own in alike.items():
        span = f"{min(own):.3g}" if len(own) == 1 else f"{min(own):.3g} to {max(own):.3g}"
        table.add_row(printable(kind), " × ".join(map(str, shape)) or "scalar", str(len(own)), span)
    return table


def _kind(name: str) -> str:
    """A tensor's name from its layer on: the numbers before it tell blocks apart, which are alike."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:-3]) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])
