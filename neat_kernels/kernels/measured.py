"""Launch configurations that were measured, from a file beside the kernels; there is none until somebody tunes.

    {"configurations": [{"device": "NVIDIA H200", "arch": "sm_90", "stage": "gemm descriptor", "block_r": 16,
                         "config": {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 3,
                                    "persistent": true},
                         "source": {"command": "…", "commit": "…", "date": "…", "versions": {"torch": "…"}}}]}

`device` is the name that the driver reports, `stage` a table of configs.py, `block_r` the columns of an r-wide tile. An
entry holds for its own device alone: another product of a family has other limits.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).resolve().with_name("measured_configs.json")
BLOCKS_R = (16, 32, 64, 128)
_ENTRY = {"device": str, "arch": str, "stage": str, "block_r": int, "config": dict, "source": dict}
_CONFIG = {
    "block_m": int,
    "block_n": int,
    "block_k": int,
    "num_warps": int,
    "num_stages": int,
    "persistent": bool,
}
_SOURCE = {"command": str, "commit": str, "date": str, "versions": dict}
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Key(NamedTuple):
    """What a measured configuration is found by."""

    arch: str
    device: str
    stage: str
    block_r: int


def key_of(entry: dict[str, Any]) -> Key:
    """The key of an entry of the file."""
    return Key(entry["arch"], entry["device"], entry["stage"], entry["block_r"])


def listed(path: Path, name: str) -> list[Any]:
    """The list `name` of a JSON file, empty where there is no file.

    Raises:
        ValueError: the file is there and does not hold an object with that list.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected an object with a list "{name}"')
    return entries


def read(path: Path, stages: Collection[str], archs: Collection[str]) -> list[dict[str, Any]]:
    """The entries of a file, none where there is no file.

    Args:
        path: the file.
        stages: names that an entry may have.
        archs: families that an entry may have.

    Raises:
        ValueError: the file is there and does not hold what it must.
    """
    entries = listed(path, "configurations")
    seen: set[Key] = set()
    for entry in entries:
        fault = _fault(entry, stages, archs)
        if fault is not None:
            raise ValueError(f"{path}: expected {fault}, got {entry!r}")
        if key_of(entry) in seen:
            raise ValueError(f"{path}: expected one configuration for {tuple(key_of(entry))}, got several")
        seen.add(key_of(entry))
    return entries


def _fault(entry: Any, stages: Collection[str], archs: Collection[str]) -> str | None:
    """What an entry should have been, or None."""
    for part, fields in ((None, _ENTRY), ("config", _CONFIG), ("source", _SOURCE)):
        holder = entry if part is None else entry[part]
        if not isinstance(holder, dict) or {name: type(value) for name, value in holder.items()} != fields:
            listed = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            return f"{'entries' if part is None else part} with {listed}"
    config = entry["config"]
    blocks = [config[name] for name in ("block_m", "block_n", "block_k")]
    for fits, expected in (
        (entry["device"] != "", "a device that has a name"),
        (entry["arch"] in archs, f"arch among {', '.join(sorted(archs))}"),
        (entry["stage"] in stages, f"stage among {', '.join(sorted(stages))}"),
        (entry["block_r"] in BLOCKS_R, f"block_r among {', '.join(map(str, BLOCKS_R))}"),
        (
            all(size == 0 or (size >= 16 and size in _POWERS) for size in blocks),
            "blocks of 0, or powers of 2 in 16…512",
        ),
        (config["num_warps"] in _POWERS[:5], "num_warps among 1, 2, 4, 8, 16"),
        (1 <= config["num_stages"] <= 8, "num_stages in 1…8"),
    ):
        if not fits:
            return expected
    return None


def date_for(device: str, entries: Collection[dict[str, Any]]) -> str | None:
    """The last day on which a configuration of this device was measured, or None."""
    return max((entry["source"]["date"][:10] for entry in entries if entry["device"] == device), default=None)
