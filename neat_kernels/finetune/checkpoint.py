"""The state of a training that was stopped, in a file from which it goes on bit by bit as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.files import write_atomically
from neat_kernels.usage import UsageError

FORMAT = "1"


def write_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, and facts that JSON can hold, to a temporary name, then rename it.

    Args:
        path: ends in .safetensors.
        tensors: by name.
        facts: floats come back with the same bits.

    Raises:
        OSError: it cannot be written; an earlier file is still there.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    write_atomically(path, save(copies, {"state": json.dumps(facts), "version": FORMAT}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` has written.

    Raises:
        UsageError: the file is not one of those.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != FORMAT:
                raise ValueError(f"version {metadata.get('version')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata["state"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"--resume: {path} is no whole state of a training: {error}") from error


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    """What trains, the optimizer's state and the random generators, by name."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in trained}
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items()})
    tensors["generator"] = torch.get_rng_state()
    if device.type in ("cuda", "xpu"):
        tensors["device_generator"] = getattr(torch, device.type).get_rng_state(device)
    return tensors


@torch.no_grad()
def restore_state(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Put back what `training_state` has told.

    Raises:
        UsageError: the state is that of another training.
    """
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name: value.shape for name, value in tensors.items() if name.startswith("model.")}
    if saved != {name: p.shape for name, p in trained.items()}:
        raise UsageError("--resume: the state is of other parameters than those that train now")
    for name, p in trained.items():
        p.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["generator"])
    if "device_generator" in tensors:
        getattr(torch, device.type).set_rng_state(tensors["device_generator"], device)
