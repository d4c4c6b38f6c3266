"""The factored layer in torch operations, and csrc's where it runs: on every device, with nothing of W's size."""
