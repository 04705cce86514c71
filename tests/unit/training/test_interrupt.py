"""Ctrl-C and SIGTERM are wishes once, and then what they were before."""

from __future__ import annotations

import os
import signal

import pytest

from sanawm_jax.training.engine.interrupt import Stopped, TerminationSignal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_first_signal_is_a_wish(number: int, status: int) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with TerminationSignal() as wish:
            assert not wish.is_set
            os.kill(os.getpid(), number)
            assert wish.is_set
            assert Stopped(1, None, is_interrupted=wish.is_interrupted).status == status
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with TerminationSignal() as wish:
            os.kill(os.getpid(), signal.SIGINT)
            assert not wish.is_set
    finally:
        signal.signal(signal.SIGINT, before)
