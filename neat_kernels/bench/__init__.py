"""Time the layer against what a user would run instead, each held to float64 first."""


class BenchError(RuntimeError):
    """A measurement failed; the message says which."""
