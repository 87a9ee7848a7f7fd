"""A figure as SVG inside a page: no ids of its own, no width, no foreign address."""

from __future__ import annotations

import io
import re
from itertools import count

from markupsafe import Markup
from matplotlib.figure import Figure

from fedp2eft.results.figures import laid_out

_drawn = count()
_HEAD = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)


def inline(figure: Figure, label: str) -> Markup:
    """Return the figure as an `<svg>` element.

    What has a gid `method-<n>-…` gets `data-method="<n>"`, by which the page shows and hides it.

    Args:
        figure: Drawn under `fedp2eft.results.figures.STYLE`, which keeps text as text.
        label: What it shows, for those who cannot see it.
    """
    file = io.StringIO()
    laid_out(figure).savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
    )
    text = file.getvalue()
    text = _HEAD.sub("", text[text.index("<svg") :])
    head, body = text.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert size is not None
    body = re.sub(r' id="method-(\d+)[^"]*"', r' data-method="\1"', body)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    mine = f"f{next(_drawn)}-"
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{mine}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{mine}", body)
    body = body.replace("xlink:href", "href")
    # a hundredth of a point is enough; digits between the tags are text
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), body)
    body = re.sub(r">\s+<", "><", body)
    title = Markup.escape(label)
    opened = (
        f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{title}" '
        f'style="max-width:{float(size[1]) * 4 / 3:.0f}px">'
    )
    return Markup(opened + body)
