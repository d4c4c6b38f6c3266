"""The performance model: bytes, operations and predicted time of every kernel, for devices that need not be here."""
