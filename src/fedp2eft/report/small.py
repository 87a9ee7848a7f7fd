"""The page's small charts as SVG: there may be a hundred, and matplotlib takes 80 ms for each.

Sizes are in points. The figures beside the page, drawn by matplotlib, show the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from unicodedata import east_asian_width

from markupsafe import Markup, escape
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from fedp2eft.report.source import ReportData
from fedp2eft.results.figures import language_bars, shade
from fedp2eft.results.layout import unit

Points = dict[int, list[tuple[float, float]]]
"""(Base's metric, method's metric) of clients, by rank."""
Range = tuple[float, float]


class Chart:
    """A frame with grid and scales; what is drawn goes into it in data units.

    Args:
        label: What it shows, for those who cannot see it.
        size: Width and height.
        x: First and last value across.
        y: Lowest and highest value.
        names: What stands under it: texts at 0, 1, 2, …, or None for values.
        titles: Of the axes, across and up.
    """

    def __init__(
        self, label: str, size: tuple[float, float], x: Range, y: Range,
        names: Sequence[str] | None, titles: tuple[str, str],
    ) -> None:  # fmt: skip
        self.label, self.size, self._x, self._y = label, size, x, y
        self._left, self._right = 42.0, size[0] - 4
        widest = max(map(_width, names or ()), default=0.0)
        turned = bool(names) and widest > (self._right - self._left) / (x[1] - x[0]) - 3
        below = 6 + widest if turned else 14
        self._top, self._bottom = 6.0, size[1] - below - (12 if titles[0] else 0)
        self.parts = ['<g font-family="sans-serif" font-size="9" fill="#000">']
        for value in _ticks(y):
            self._line((x[0], value), (x[1], value), "#ddd", 0.8)
            self._text(self._left - 4, self.up(value) + 3, f"{value:g}", 'text-anchor="end"')
        for place, text in (
            [(v, f"{v:g}") for v in _ticks(x)] if names is None else enumerate(names)
        ):
            at, under = self.across(place), self._bottom + 11
            if turned:
                turn = f'text-anchor="end" transform="rotate(-90 {at + 3:.1f} {under - 6:.1f})"'
                self._text(at + 3, under - 6, text, turn)
            else:
                self._text(at, under, text, 'text-anchor="middle"')
        middle = f'text-anchor="middle" transform="rotate(-90 9 {self.up(sum(y) / 2):.1f})"'
        self._text(9, self.up(sum(y) / 2), titles[1], middle)
        self._text(self.across(sum(x) / 2), size[1] - 3, titles[0], 'text-anchor="middle"')

    def across(self, value: float) -> float:
        """Return the horizontal position of a value."""
        low, high = self._x
        return self._left + (value - low) / (high - low) * (self._right - self._left)

    def up(self, value: float) -> float:
        """Return the vertical position of a value."""
        low, high = self._y
        return self._bottom - (value - low) / (high - low) * (self._bottom - self._top)

    def bar(self, left: float, width: float, value: float, colour: str) -> None:
        """Draw a bar from 0; nothing for a value that is none."""
        if isfinite(value):
            x, y = self.across(left), self.up(value)
            wide, tall = self.across(left + width) - x, self._bottom - y
            self.parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"/>'
            )

    def line(self, a: Range, b: Range, more: str = "") -> None:
        """Draw a black line from (x, y) to (x, y)."""
        if isfinite(a[1]) and isfinite(b[1]):
            self._line(a, b, "#000", 1.2, more)

    def dots(self, points: Iterable[Range], colour: str) -> None:
        """Draw dots as one path, a tenth of the size of as many circles."""
        path = "".join(f"M{self.across(x):.1f} {self.up(y):.1f}h0" for x, y in points)
        self.parts.append(
            f'<path d="{path}" style="stroke:{colour};stroke-width:4.5;stroke-linecap:round;'
            'stroke-opacity:.75;fill:none"/>'
        )

    def svg(self) -> Markup:
        """Return the chart as an `<svg>` element."""
        width, height = self.size
        frame = f"M{self._left:.1f} {self._top}V{self._bottom:.1f}H{self._right:.1f}"
        return Markup(
            f'<svg viewBox="0 0 {width:.1f} {height:.1f}" role="img" '
            f'aria-label="{escape(self.label)}" style="max-width:{width * 4 / 3:.0f}px">'
            f'{"".join(self.parts)}<path d="{frame}" stroke="#000" stroke-width=".8" fill="none"/>'
            "</g></svg>"
        )

    def _line(self, a: Range, b: Range, colour: str, width: float, more: str = "") -> None:
        self.parts.append(
            f'<path d="M{self.across(a[0]):.1f} {self.up(a[1]):.1f}L{self.across(b[0]):.1f} '
            f'{self.up(b[1]):.1f}" stroke="{colour}" stroke-width="{width}" {more}/>'
        )

    def _text(self, x: float, y: float, text: str, more: str) -> None:
        if text:
            self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>')


def highest_bar(report: ReportData, base: str, pool: str) -> float:
    """Return the largest metric of any method and language, so that all charts have one scale."""
    found = (language_bars(report.comparison, base, pool, m) for m in report.comparison.methods)
    rows = (row for drawn, level in found for row in (*drawn.values(), level))
    return max((v for row in rows for v in row if isfinite(v)), default=1.0) or 1.0


def language_chart(report: ReportData, base: str, pool: str, method: str, highest: float) -> Markup:
    """Return the metric by language, a bar per rank, the base model as a line."""
    comparison = report.comparison
    languages = comparison.languages(base, pool)
    drawn, level = language_bars(comparison, base, pool, method)
    size = (72 * max(2.6, 1.2 + 0.26 * len(languages)), 72 * 1.9)
    across, up = (-0.6, len(languages) - 0.4), (0.0, 1.05 * highest)
    chart = Chart(method, size, across, up, languages, ("", unit(comparison.metric)))
    width = 0.8 / max(1, len(drawn))
    for number, (rank, row) in enumerate(drawn.items()):
        for place, value in enumerate(row):
            left = place - 0.4 + number * width
            chart.bar(left, width, value, to_hex(shade(comparison.ranks, rank)))
    for place, value in enumerate(level):
        chart.line((place - 0.45, value), (place + 0.45, value))
    return chart.svg()


def span_of(every: Iterable[Points]) -> Range:
    """Return the scale that holds all dots of several charts."""
    values = [v for points in every for pairs in points.values() for pair in pairs for v in pair]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def client_chart(report: ReportData, method: str, points: Points, both: Range) -> Markup:
    """Return a dot per client: across, the base model's score; up, the personalized one's.

    Args:
        report: Names ranks and metric.
        method: The method.
        points: The clients' scores.
        both: The scale of both axes.
    """
    ranks, metric = report.comparison.ranks, unit(report.comparison.metric)
    titles = (f"base model ({metric})", f"personalized ({metric})")
    chart = Chart(method, (72 * 2.6, 72 * 2.4), both, both, None, titles)
    for rank, pairs in sorted(points.items(), reverse=True):
        if rank in ranks or rank == 0:
            chart.dots(pairs, to_hex(shade(ranks, rank)))
    chart.line((both[0], both[0]), (both[1], both[1]), 'stroke-dasharray="3 2"')
    return chart.svg()


def _width(text: str) -> float:
    """Return the most that a text of size 9 takes in usual sans-serif fonts."""
    wide = sum(letter in "mwMW" or east_asian_width(letter) in "WF" for letter in text)
    return 9 * (wide + 0.64 * (len(text) - wide))


def _ticks(span: Range) -> list[float]:
    """Return round values within a range."""
    return [float(v) for v in MaxNLocator(5).tick_values(*span) if span[0] <= v <= span[1]]
