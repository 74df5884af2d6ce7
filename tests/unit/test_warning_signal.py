"""The signal is noted, and given back where nobody acts on it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from pgp_lightning import warning_signal


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)
    warning_signal.forget()


def test_it_is_noted_and_forgotten() -> None:
    warning_signal.listen()
    assert not warning_signal.warned()
    signal.raise_signal(signal.SIGUSR1)
    assert warning_signal.warned()
    warning_signal.forget()
    assert not warning_signal.warned()


def test_it_is_given_back_with_what_came() -> None:
    came: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    warning_signal.release()  # not ours: it stays
    signal.raise_signal(signal.SIGUSR1)
    assert len(came) == 1
    warning_signal.listen()
    warning_signal.release()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_outside_of_the_main_thread_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=warning_signal.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before
