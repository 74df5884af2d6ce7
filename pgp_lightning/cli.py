"""The console script `lightning`: fit, validate, test and predict, with errors of one line.

Only light imports stand here: a worker process started afresh imports this file again.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from pgp_lightning import warning_signal
from pgp_lightning.errors import ConfigError, DataError, lost_peer

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run `lightning` and return the exit code.

    Args:
        args: command line arguments; by default the process's. `--debug` anywhere among them shows tracebacks.

    Returns:
        0 after success, 2 when the set-up cannot work, 1 when the data turned out unusable on the way.

    Raises:
        SystemExit: code 2 for what the parser refuses, code 0 after `--help`.
        Exception: any error that is not the user's, and with `--debug` every one.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if "SLURM_JOB_ID" in os.environ and "fit" in arguments:
        warning_signal.listen()  # the imports below take long enough to be warned, and killed, meanwhile
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from pgp_lightning.training.command_line import RunCLI

    try:
        RunCLI.run(arguments, debug)
    except DataError as error:
        return _report(error, 1, debug)
    except (ConfigError, FileNotFoundError, MisconfigurationException) as error:
        return _report(error, 2, debug)
    except RuntimeError as error:
        if not lost_peer(error) or debug:
            raise
        told = "another process of this run has ended or does not answer; what it printed says why"
        return _report(RuntimeError(f"{told}. Go on with --ckpt_path last ({error})"), 1, debug)
    return 0


def _report(error: Exception, code: int, debug: bool) -> int:
    """Print an error as one line, or with its traceback, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    else:
        sys.stderr.write(f"error: {_one_line(error)}\n")
    return code


def _one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    text = str(error) or type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:
        # An error from a data worker carries its traceback; the message follows it as "module.Class: message".
        name = f"{type(error).__name__}: "
        text = text[text.rindex(name) + len(name) :] if name in text else text.strip().splitlines()[-1]
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
