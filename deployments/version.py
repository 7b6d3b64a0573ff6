"""The version of the running code; the same as in pyproject.toml."""

VERSION = "0.1.0"
