"""Measure launch configurations and plans of the base GEMM on the device at hand, and write what launches then read."""


class TuningError(RuntimeError):
    """Something could not be measured; what could is written."""
