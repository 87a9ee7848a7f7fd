"""The page in headless Chromium: no error, no request, and its controls work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from pages import copied

from fedp2eft.files import write_json
from fedp2eft.report.page import page
from fedp2eft.report.source import read_report

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium: apt install chromium")
EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script>"


@pytest.fixture(scope="module")
def file(finished, tmp_path_factory) -> Path:
    """The page of a run with generations that would be code."""
    folder = copied(finished.folder, tmp_path_factory.mktemp("browser") / "run")
    rows = [{"prompt": EVIL, "reference": "b", "generated": EVIL}]
    write_json(
        folder / "generations" / "base-r0" / "x.json",
        {"client": EVIL, "language": "de", "pool": "seen", "method": "base", "rank": 0,
         "rows": rows},
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page(read_report(folder, ask=False)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[chromium.Browser]:
    made = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def opened(browser, file) -> chromium.Browser:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(file)
    return browser


def column(browser: chromium.Browser, table: str, number: int) -> list[str]:
    query = f"[...document.querySelectorAll('#{table} tbody tr')]"
    return browser.run(f"{query}.map(row => row.cells[{number}].textContent)")


def pick(browser: chromium.Browser, select: str, value: str) -> None:
    browser.run(
        f"(() => {{ const s = document.querySelector('{select}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_no_error_and_no_request(opened, file):
    assert opened.errors == []
    assert opened.requests == [file.resolve().as_uri()]
    assert (
        opened.run("document.querySelectorAll('#generations img, #generations script').length") == 0
    )
    assert EVIL in opened.run("document.querySelector('#generations td').textContent")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen_light_and_dark(browser, file, width, dark):
    browser.open(file, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(22, 25, 29)" if dark else "rgb(255, 255, 255)")
    # no figure is wider than what is around it
    assert browser.run(
        "[...document.querySelectorAll('figure')].every(f => f.scrollWidth <= f.clientWidth + 1)"
    )


def test_tables_are_sorted(opened):
    click = "document.querySelectorAll('#table-0 thead button')[2].click()"
    before = column(opened, "table-0", 2)
    opened.run(click)
    down = [float(text) for text in column(opened, "table-0", 2)]
    assert down == sorted(map(float, before), reverse=True)
    opened.run(click)
    assert [float(text) for text in column(opened, "table-0", 2)] == sorted(down)
    opened.run("document.querySelectorAll('#table-0 thead button')[6].click()")  # to lora
    assert column(opened, "table-0", 6)[-1] == "–"
    opened.run("document.querySelectorAll('#table-0 thead button')[1].click()")
    names = column(opened, "table-0", 1)
    assert names == sorted(names)


def test_clients_are_chosen(opened):
    shown = "[...document.querySelectorAll('[data-scores]')].map(part => part.hidden)"
    assert opened.run(shown) == [False, True]
    pick(opened, "select[data-choose=scores]", "1")
    assert opened.run(shown) == [True, False]


def test_methods_are_shown_and_hidden(opened):
    parts = (
        "[...document.querySelectorAll('[data-method=\"3\"]')]"
        ".map(part => [part.tagName.toLowerCase(), part.style.display])"
    )
    assert {kind for kind, _ in opened.run(parts)} == {"tr", "figure", "g"}
    opened.run("document.querySelector('#methods input[value=\"3\"]').click()")
    assert {shown for _, shown in opened.run(parts)} == {"none"}
    opened.run("document.querySelector('#methods [data-all=\"1\"]').click()")
    assert {shown for _, shown in opened.run(parts)} == {""}


def test_heat_map_is_switched(opened):
    total = (
        "[...document.querySelectorAll('#heat tbody td')]"
        ".reduce((sum, cell) => sum + (parseFloat(cell.textContent) || 0), 0)"
    )
    layers = 14
    assert opened.run(total) == pytest.approx(1 * layers, abs=0.7)  # shown with one decimal
    pick(opened, "#s-rank", "2")
    pick(opened, "#s-language", "fr")
    assert opened.run(total) == pytest.approx(2 * layers, abs=0.7)
    assert "fr, r = 2" in opened.run("document.querySelector('#heat caption').textContent")
    pick(opened, "#s-mode", "difference")
    assert opened.run(total) == pytest.approx(0, abs=0.7)
    assert "difference" in opened.run("document.querySelector('#heat caption').textContent")


def test_it_prints(opened, tmp_path):
    opened.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_paper_is_white_and_shows_what_cannot_be_chosen_on_it(browser, file):
    """All clients' results, what is folded, the key to the methods' marks, the texts' clients."""

    def all_seen(query: str) -> list[bool]:
        return browser.run(
            f"[...document.querySelectorAll('{query}')].map(part => part.checkVisibility())"
        )

    browser.open(file, dark=True)
    browser.ask(
        "Emulation.setEmulatedMedia", media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )  # fmt: skip
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all_seen("[data-scores]") == [True, True]
    assert set(all_seen("details.fold, details.fold table, #budget summary")) == {True}
    browser.run("document.querySelector('#methods input').checked = false")
    assert all_seen("#methods label") == [False] + [True] * (len(all_seen("#methods label")) - 1)
    assert not any(all_seen("#methods input, #methods button, select"))
    assert all_seen("#generations summary") == [True]
    assert browser.run("document.documentElement.scrollWidth") <= 1200
