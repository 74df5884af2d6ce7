"""The two kinds of error a user can cause, which the command line prints as one line, and one that a process can."""

__all__ = ["ConfigError", "DataError", "lost_peer"]


class ConfigError(ValueError):
    """A set-up that cannot work: says what was expected, what came and what to do."""


class DataError(ValueError):
    """Data that cannot be used: names the file or sample and what to do."""


def lost_peer(error: BaseException) -> bool:
    """Return whether an error says no more than that another process of the run is gone, or does not answer."""
    text = str(error)
    transport = any(name in text for name in ("gloo", "NCCL", "TCPStore"))
    lost = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "timeout", "remote process exited", "aborted")
    return isinstance(error, RuntimeError) and transport and any(words in text for words in lost)
