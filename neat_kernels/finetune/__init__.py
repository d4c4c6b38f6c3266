"""Fine-tune a pretrained text model as a classifier by Neat, LoRA, a linear probe or in full, and compare them."""
