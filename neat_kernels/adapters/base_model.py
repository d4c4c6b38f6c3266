"""The base model that an adapter's configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neat_kernels.adapters.errors import AdapterError

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_base(path: Path, values: Mapping[str, Any], name: str | None, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Load the base model by transformers, in the class that the adapter was made for.

    Args:
        path: of the adapter's folder, for the messages.
        values: of adapter_config.json.
        name: folder or hub id of the base; None is the one that the configuration names, from safetensors alone.
        dtype: of the weights; "auto" is that of the checkpoint.

    Raises:
        AdapterError: the configuration names no base or no class of transformers, or the model cannot be loaded.
    """
    kind = _model_class(values)
    recorded = values.get("base_model_name_or_path")
    location = name or recorded
    if kind is None or not isinstance(location, str) or not location:
        raise AdapterError(
            f"{path}: expected a base model (model= or --model), or a configuration that names it and its task; "
            f"got base_model_name_or_path {recorded!r} and task_type {values.get('task_type')!r}"
        )
    # A pickle that a file names must not be opened for that.
    options = {} if name else {"use_safetensors": True}
    try:
        return kind.from_pretrained(location, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: the base model {location!r} cannot be loaded: {error}") from error


def _model_class(values: Mapping[str, Any]) -> Any:
    """A class of transformers, by its name, else by the task; no other library is imported because a file says so."""
    import transformers

    mapping = values.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    task = values.get("task_type")
    return getattr(transformers, _AUTO[task]) if isinstance(task, str) and task in _AUTO else None
