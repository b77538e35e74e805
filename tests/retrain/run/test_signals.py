"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sparsepass.retrain.run.processes import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_flag(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert (stop.requested, stop.name) == (False, "")
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.name) == (True, number.name)
    assert stop.requested


def test_a_second_interrupt_is_at_once() -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.name == "SIGINT"


def test_old_handlers_come_back_after_errors_too() -> None:
    def mine(*_: object) -> None:
        return

    before = signal.signal(signal.SIGTERM, mine)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError), StopSignals():
            _ = 1 / (signal.getsignal(signal.SIGTERM) is mine)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_can_be_entered_again() -> None:
    stop = StopSignals()
    with stop:
        signal.raise_signal(signal.SIGTERM)
    with stop:
        assert not stop.requested


def test_in_another_thread_it_does_nothing() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler, False]


def test_a_process_leaves_its_loop_when_it_is_told() -> None:
    program = (
        "import time; from sparsepass.retrain.run.processes import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        "print('saved', stop.name)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == "saved SIGTERM\n"
    assert process.returncode == 0
