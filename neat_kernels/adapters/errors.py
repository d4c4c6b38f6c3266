"""The error of adapter files."""


class AdapterError(ValueError):
    """An adapter folder, or what was to become one, is not as it must be; the message says what came instead."""
