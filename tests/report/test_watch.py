"""The live page: written while a run goes on, cheap, never in its way."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import write_comparison

from fedp2eft.cli import main
from fedp2eft.progress import LogReporter
from fedp2eft.report import watch
from fedp2eft.report.watch import WatchReporter, watched

REFRESH = '<meta http-equiv="refresh"'


def test_page_reloads_only_while_the_run_goes_on(tmp_path):
    folder = write_comparison(tmp_path / "c")
    page = folder / "report.html"
    with watched(LogReporter(), folder) as reporter:
        reporter.start("compare", 6, 6)
        assert REFRESH in page.read_text(encoding="utf-8")
    assert REFRESH not in page.read_text(encoding="utf-8")


def test_a_run_that_is_stopped_leaves_a_page_that_stands_still(tmp_path):
    folder = write_comparison(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt), watched(LogReporter(), folder):
        raise KeyboardInterrupt
    assert REFRESH not in (folder / "report.html").read_text(encoding="utf-8")


def test_it_is_written_at_most_now_and_then(tmp_path, monkeypatch):
    now, written = [100.0], []
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def write(self: WatchReporter, *, running: bool) -> None:
        written.append(now[0])
        now[0] += 1.0  # it takes a second

    monkeypatch.setattr(WatchReporter, "write", write)
    reporter = WatchReporter(LogReporter(), tmp_path)
    reporter.start("psg", 100, 0)
    for _ in range(60):
        now[0] += 1.0
        reporter.advance("psg", "")
        reporter.part("psg", 0.5, "")
    # a second's work each: 5 % of the time are 20 seconds between two
    assert written == [100.0, 121.0, 142.0, 163.0]


def test_what_goes_wrong_with_the_page_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    reporter = WatchReporter(LogReporter(), tmp_path / "none")
    reporter.advance("psg", "")  # there is no folder yet
    assert not caplog.records
    folder = write_comparison(tmp_path / "c")
    monkeypatch.setattr(watch, "page", lambda *_, **__: 1 / 0)
    WatchReporter(LogReporter(), folder).advance("psg", "")
    assert "could not be written" in caplog.text


def test_train_with_watch(world, three_clients, tmp_path, capsys):
    run = tmp_path / "run"
    config = world.yaml(
        tmp_path / "tiny.yaml", data__path=str(three_clients), base__rounds=1,
        federation__rounds=1, evaluation__ranks=[1],
    )  # fmt: skip
    assert main(["train", str(config), "--run", str(run), "--watch"]) == 0
    assert f"Live report: {Path(run) / 'report.html'}" in capsys.readouterr().out
    text = (run / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in text
    assert 'id="results"' in text
    assert 'id="structure"' in text
