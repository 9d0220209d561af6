"""SIGTERM: before a run has something to save, after it, and twice."""

import os
import signal

from train.preemption import EXIT_CODE, Notice


def test_a_signal_is_noted_from_listen_on_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Notice() as notice:
        assert signal.getsignal(signal.SIGTERM) is before and not notice.arrived()
        notice.listen()
        notice.listen()
        assert not notice.arrived()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_is_harmless():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Notice() as notice:
            notice.listen()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                assert notice.arrived() and notice.arrived()
        # The process is about to end.
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_exit_code_is_that_of_a_process_that_the_signal_ended():
    assert EXIT_CODE == 143
