"""Ctrl-C is one line, also where a library turns it into an error of its own."""

from __future__ import annotations

import signal

import pytest

from fedp2eft import cli


def turned_into_another_error() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ModuleNotFoundError("Could not import module 'Bloom'") from None


def just_pressed() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("command", [just_pressed, turned_into_another_error])
def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command
) -> None:
    usual = signal.getsignal(signal.SIGINT)
    # a shell's background jobs ignore SIGINT, and so would this one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "_dispatch", lambda words: command())
    try:
        assert cli.main(["doctor"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capsys.readouterr().err == "fedp2eft: Interrupted.\n"


def test_an_error_without_ctrl_c_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> None:
        raise ModuleNotFoundError("broken")

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(ModuleNotFoundError, match="broken"):
        cli.main(["doctor"])
