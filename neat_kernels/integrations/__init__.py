"""Bridges to other libraries, each imported only with its own module."""
