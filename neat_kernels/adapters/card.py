"""The model card of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neat_kernels._version import __version__
from neat_kernels.adapters.names import LORA, NEAT

_LOAD = {
    "neat-kernels": (
        "import neat_kernels as nk\n"
        "from transformers import {auto}\n\n"
        'model = nk.load_adapter({auto}.from_pretrained("{base}"), "this folder")'
    ),
    "peft": (
        "from peft import PeftModel\n"
        "from transformers import {auto}\n\n"
        'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "this folder")'
    ),
}
_TITLE = {LORA: "LoRA adapter, exported from Neat", NEAT: "Neat adapter"}


def model_card(config: dict[str, Any], reasons: Sequence[str] = ()) -> str:
    """Markdown with the metadata that a hub reads: what the adapter is, and how to load it.

    Args:
        config: adapter_config.json.
        reasons: why PEFT cannot load it.
    """
    kind, base = config["peft_type"], config["base_model_name_or_path"]
    by_peft = kind != NEAT
    head = ["---", f"library_name: {'peft' if by_peft else 'neat-kernels'}"]
    # A hub takes base_model for one of its own; a folder of this machine is none.
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    head += ["tags:", f"- {kind.lower()}", "- neat-kernels", "---", ""]
    mapping = config["auto_mapping"] or {}
    known = str(mapping.get("parent_library")).startswith("transformers.")
    names = {"auto": mapping["base_model_class"] if known else "AutoModel", "base": base or "the base model"}
    readers = (["neat-kernels"] if kind != LORA else []) + (["peft"] if by_peft else [])
    parts = [
        f"# {_TITLE.get(kind, 'Neat adapter (PEANUT in PEFT)')}",
        f"Base model: {base or 'not recorded'}. Written by neat-kernels {__version__}.",
        *(f"With {reader}:\n\n```python\n{_LOAD[reader].format(**names)}\n```" for reader in readers),
    ]
    if reasons:
        parts.append(f"PEFT cannot express this adapter: {', '.join(reasons)}.")
    facts = [f"- {name}: {_short(value)}" for name, value in config.items() if _told(name, value)]
    return "\n".join(head) + "\n\n".join([*parts, "\n".join(facts)]) + "\n"


def _told(name: str, value: Any) -> bool:
    silent = ("peft_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "layer_options")
    return name not in silent and value not in (None, [], {}, False)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{', '.join(map(str, value[:8]))} and {len(value) - 8} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
