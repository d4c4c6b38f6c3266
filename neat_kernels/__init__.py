"""Fused fine-tuning with Neat: a frozen linear layer plus a small network of its weight, at the price of LoRA."""

from neat_kernels import functional, reference
from neat_kernels._version import __version__
from neat_kernels.adapters.base_check import BaseMismatchWarning
from neat_kernels.adapters.config import NeatConfig
from neat_kernels.adapters.errors import AdapterError
from neat_kernels.adapters.load import load_adapter
from neat_kernels.adapters.lora_export import ExportedLora, export_lora
from neat_kernels.adapters.lora_import import from_lora
from neat_kernels.adapters.save import SavedAdapter, save_adapter
from neat_kernels.adapters.summary import TrainableSummary, trainable_summary
from neat_kernels.adapters.swap import apply_neat, merge_neat, remove_neat
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.lora_layer import FusedLoraLinear
from neat_kernels.plan import BackendUnavailableError, Plan
from neat_kernels.reuse import reuse_features

__all__ = [
    "AdapterError",
    "BackendUnavailableError",
    "BaseMismatchWarning",
    "ExportedLora",
    "FusedLoraLinear",
    "FusedNeatLinear",
    "NeatConfig",
    "Plan",
    "SavedAdapter",
    "TrainableSummary",
    "__version__",
    "apply_neat",
    "export_lora",
    "from_lora",
    "functional",
    "load_adapter",
    "merge_neat",
    "reference",
    "remove_neat",
    "reuse_features",
    "save_adapter",
    "trainable_summary",
]
