from __future__ import annotations

import io
import sys

import pytest

from mass_export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """`terminal()` makes stderr a terminal; in the test itself, since pytest sets stderr after the fixtures."""

    def attach():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        return sys.stderr

    return attach


def test_items_pass_unchanged_and_nothing_is_shown_without_a_terminal(capsys):
    assert list(Progress().track(range(3), "Counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_nothing(terminal):
    screen = terminal()
    assert list(Progress(quiet=True).track(range(3), "Counting")) == [0, 1, 2]
    assert screen.getvalue() == ""


def test_a_terminal_sees_what_is_done_and_how_much(terminal):
    screen = terminal()
    progress = Progress()
    for _ in progress.track(["a", "b"], "Factorising [tasks]"):
        list(progress.track(iter("xyz"), "Layers", total=3))
    assert list(progress.track(iter("pq"), "Again")) == ["p", "q"]
    shown = screen.getvalue()
    assert "Factorising [tasks]" in shown
    assert "2/2" in shown
    assert "Again" in shown


def test_an_error_in_the_loop_ends_the_bars(terminal):
    screen = terminal()
    progress = Progress()
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in progress.track([1], "Dividing")]
    assert list(progress.track([1], "Going on")) == [1]
    assert "Going on" in screen.getvalue()
