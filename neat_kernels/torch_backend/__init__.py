"""The factored layer in plain torch operations: runs on every device and allocates nothing of W's size."""
