"""The refusal of what a command was asked for."""


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what was expected and what came."""
