"""The progress line: what it says, when, and that its speed leaves out pauses."""

import io
import re
import sys

import pytest
from rich.console import Console

from sparsepass.retrain.run.progress import ProgressLine


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, total: int = 100, **options: float) -> tuple[ProgressLine, io.StringIO]:
    text = io.StringIO()
    line = ProgressLine(total, console=Console(file=text, width=60), clock=clock, **options)  # type: ignore[arg-type]
    return line, text


def test_what_it_says() -> None:
    line, text = plain(clock := Clock())
    with line:
        clock.now += 2
        line.update(1, tokens=3000, loss=3.14159, kl=0.5, flip_rate=0.0123, lr=2e-4)
    assert re.fullmatch(
        r"step 1/100  loss 3\.1416  KL 0\.5000  flips 1\.230%  lr 2\.00e-04  1,500 tokens/s  \d+\.\d GB  ETA 0:03:18\n",
        text.getvalue(),
    )


def test_without_a_terminal_a_line_now_and_then_and_the_last() -> None:
    line, text = plain(clock := Clock(), total=10, interval_seconds=30)
    with line:
        for step in range(1, 11):
            clock.now += 8
            line.update(step, tokens=1)
    assert re.findall(r"step (\d+)/10", text.getvalue()) == ["1", "5", "9", "10"]
    assert "\x1b" not in text.getvalue()


def test_speed_leaves_out_pauses() -> None:
    line, _ = plain(clock := Clock())
    with line:
        for step in range(1, 5):
            clock.now += 2
            line.update(step, tokens=100)
            with line.pause("validating"):
                clock.now += 1000
            clock.now += 3
    clock.now += 0
    assert line.tokens_per_second == pytest.approx(400 / (2 + 5 + 5 + 5))
    assert line.remaining_seconds == pytest.approx(96 * 17 / 4)


def test_speed_is_that_of_the_last_steps() -> None:
    line, _ = plain(clock := Clock(), window_steps=3)
    with line:
        for step in range(1, 9):
            clock.now += 10 if step < 6 else 1
            line.update(step, tokens=50)
    assert line.tokens_per_second == 50
    assert line.remaining_seconds == 92


def test_a_resumed_run_counts_its_own_steps_only() -> None:
    line, _ = plain(clock := Clock(), start=90)
    assert line.tokens_per_second is None
    assert line.remaining_seconds is None
    with line:
        clock.now += 4
        line.update(92, tokens=10)
    assert line.remaining_seconds == 16


def test_the_time_before_it_is_entered_does_not_count() -> None:
    line, _ = plain(clock := Clock())
    clock.now += 1000
    with line:
        clock.now += 1
        line.update(1, tokens=7)
    assert line.tokens_per_second == 7


def test_other_processes_show_nothing_but_know_their_speed() -> None:
    line, text = plain(clock := Clock(), enabled=False)
    with line:
        clock.now += 1
        line.update(1, tokens=7)
        line.print("hello")
    assert text.getvalue() == ""
    assert line.tokens_per_second == 7


def test_it_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(1) as line:
        line.update(1, tokens=7)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("step 1/1")


class TestOnATerminal:
    def test_other_output_stands_above_the_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = io.StringIO()
        monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        console = Console(file=text, width=100, force_terminal=True, color_system=None)
        with ProgressLine(2, console=console, clock=(clock := Clock())) as line:
            clock.now += 1
            line.update(1, tokens=1000, loss=2.5, lr=1e-4)
            print("a message of somebody else", file=sys.stderr)
            print("a result")
            line.print("resumed from [bold] step-00000001")
            with line.pause("validating [x]"):
                pass
        shown = text.getvalue()
        assert re.search(r"step 1/2 .* loss 2\.5000  lr 1\.00e-04  1,000", shown.splitlines()[-2]), "what is left at the end"
        erase_line = "\r\x1b[2K"
        assert f"{erase_line}a message of somebody else\n" in shown
        assert f"{erase_line}resumed from [bold] step-00000001\n" in shown
        assert piped.getvalue() == "a result\n", "what goes into a pipe stays there"
        assert "validating [x]" in shown

    def test_it_stays_one_line_when_the_terminal_is_narrow(self) -> None:
        text = io.StringIO()
        console = Console(file=text, width=40, force_terminal=True, color_system=None)
        with ProgressLine(2, console=console, clock=(clock := Clock())) as line:
            clock.now += 1
            line.update(1, tokens=1000, loss=2.5, kl=1.0, flip_rate=0.5, lr=1e-4)
        assert "\x1b[1A" not in text.getvalue(), "it moved up: the live line took more than one"

    def test_it_ends_when_the_training_fails(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True)
        before = sys.stdout
        with pytest.raises(RuntimeError), ProgressLine(2, console=console):
            raise RuntimeError
        assert sys.stdout is before
