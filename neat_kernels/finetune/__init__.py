"""Fine-tune a pretrained text model by Neat, LoRA, a linear probe or in full, and compare them."""

from neat_kernels.finetune.artifacts import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]
