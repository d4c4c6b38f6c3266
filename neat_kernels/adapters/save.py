"""Write an adapter to a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neat_kernels._version import __version__
from neat_kernels.adapters.card import model_card
from neat_kernels.adapters.description import CARD_FILE, CONFIG_FILE, FILES, WEIGHTS_FILE
from neat_kernels.adapters.folder import check_destination, whole_folder
from neat_kernels.adapters.inventory import Inventory, copied, take_inventory
from neat_kernels.adapters.names import PARAMETER_PREFIX, PREFIX, layer_parameters
from neat_kernels.adapters.parallel import Savers
from neat_kernels.layer import FusedNeatLinear

# Of the metadata of a safetensors file, whose values are strings.
METADATA = "neat_kernels"


@dataclass(frozen=True)
class SavedAdapter:
    """What was written.

    Args:
        folder: where.
        peft_type: "PEANUT", which stock PEFT loads, or "NEAT".
        layers: number of adapted layers.
        parameters: number of values in the file.
        reasons: why stock PEFT cannot load it; empty where it can.
    """

    folder: Path
    peft_type: str
    layers: int
    parameters: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        who = f"neat-kernels alone ({', '.join(self.reasons)})" if self.reasons else "neat-kernels and by PEFT"
        return f"{self.folder}: {self.peft_type}, {self.layers} layers, {self.parameters:,} parameters; loaded by {who}"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False) -> SavedAdapter:
    """Write what was trained to a folder: adapter_config.json, adapter_model.safetensors and a model card.

    Where PEFT's PEANUT can express the adapter, the folder is one that `PeftModel.from_pretrained` loads; otherwise its
    type is NEAT. The file holds the adapters, `modules_to_save`, other parameters that are trainable, and a hash of
    each base weight. The folder is there whole or not at all. Where fully_shard() has sharded the model, every process
    calls this: one tensor after the other is gathered, and the first process writes. Under DistributedDataParallel the
    first process writes, whether the others call this or not.

    Args:
        model: a model with Neat layers inside, merged or not.
        folder: a new or empty folder; its parents are made.
        overwrite: replace an adapter that is there, in one step where the system can.

    Returns:
        What was written, and why PEFT cannot load it, if it cannot.

    Raises:
        AdapterError: the model has no Neat layer; values are not finite or not in this process; the folder exists or
            holds other files. Nothing is written then.
        OSError: the disk is full or cannot be written. What was in the folder is still there then.
    """
    destination, savers = Path(folder), Savers.of(model)
    savers.first(lambda: check_destination(destination, overwrite, FILES))
    inventory = take_inventory(model)
    config = inventory.description.as_config(inventory.every)
    tensors = _tensors(inventory, config["peft_type"])
    saved = SavedAdapter(
        destination,
        config["peft_type"],
        len(inventory.layers),
        sum(t.numel() for t in tensors.values()),
        tuple(inventory.description.reasons_against_peanut()),
    )
    base = inventory.fingerprints()
    savers.first(lambda: write_adapter(destination, config, tensors, base, saved.reasons))
    return saved


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    base: Mapping[str, str],
    reasons: Sequence[str] = (),
) -> None:
    """The three files of an adapter, whole or not at all.

    Args:
        folder: checked by `check_destination`.
        config: adapter_config.json.
        tensors: by their names in the file.
        base: hashes of the base weights.
        reasons: why PEFT cannot load it.

    Raises:
        OSError: they cannot be written.
    """
    metadata = {"version": __version__, "base": base}
    with whole_folder(folder) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        write_tensors(temporary / WEIGHTS_FILE, tensors, {METADATA: json.dumps(metadata)})
        (temporary / CARD_FILE).write_text(model_card(config, reasons), encoding="utf-8")


def write_json(path: Path, values: object) -> None:
    """Indented JSON, as PEFT writes its configurations."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, in a block of `whole_folder`."""
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt", **metadata})


def _tensors(inventory: Inventory, peft_type: str) -> dict[str, Tensor]:
    prefix = PARAMETER_PREFIX[peft_type]
    tensors = {
        f"{PREFIX}{name}.{prefix}{suffix}": copied(f"{name}.neat_{suffix}", parameter)
        for name, layer in inventory.layers.items()
        if isinstance(layer, FusedNeatLinear)
        for suffix, parameter in layer_parameters(layer)
    }
    return {**tensors, **{f"{PREFIX}{name}": copied(name, value) for name, value in inventory.other_tensors()}}
