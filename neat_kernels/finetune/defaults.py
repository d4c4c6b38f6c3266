"""The learning rates that `neat-kernels finetune` uses when --lr is not given."""

HEAD_LEARNING_RATE = 3e-2
LEARNING_RATES = {"probe": 1e-2, "lora": 3e-3, "neat": 3e-3, "full": 3e-4}
