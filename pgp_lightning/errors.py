"""The two kinds of error a user can cause; the command line prints them as one line."""

__all__ = ["ConfigError", "DataError"]


class ConfigError(ValueError):
    """A set-up that cannot work: says what was expected, what came and what to do."""


class DataError(ValueError):
    """Data that cannot be used: names the file or sample and what to do."""
