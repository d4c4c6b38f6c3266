"""Neat under Hugging Face PEFT: its own PEANuT and LoRA layers made fast by one call."""

from neat_kernels.integrations.peft.accelerate import Report, accelerate

__all__ = ["Report", "accelerate"]
