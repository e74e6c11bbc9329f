"""One SVG of all rows that are a ratio with a bar: how much of its bar each one takes. Readable in light and dark."""

from collections.abc import Sequence
from html import escape

from tests.bench.measure import Result

ROW, LEFT, WIDE, RIGHT = 26, 580, 300, 130
STYLE = """
text { font: 13px sans-serif; fill: #222 } .met { fill: #2b7a4b } .not { fill: #b5482f } line { stroke: #888 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .met { fill: #5cb585 } .not { fill: #e58a6f } }
"""


def draw(results: Sequence[Result]) -> str:
    """Bars to the left of the line are within their bar; those beyond it are cut at twice the bar."""
    rows = [(r, share) for r in results if (share := _share(r)) is not None]
    height = ROW * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDE + RIGHT} {height}"'
        f' width="{LEFT + WIDE + RIGHT}" height="{height}"><style>{STYLE}</style>',
        f'<text x="{LEFT + WIDE / 2}" y="16" text-anchor="middle">bar</text>',
        f'<line x1="{LEFT + WIDE / 2}" y1="22" x2="{LEFT + WIDE / 2}" y2="{height - 10}"/>',
    ]
    for number, (result, share) in enumerate(rows, 1):
        y = number * ROW
        width = max(1, min(share, 2) * WIDE / 2)
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(result.name[:90])}</text>',
            f'<rect class="{"met" if result.ok else "not"}" x="{LEFT}" y="{y + 5}" width="{width:.0f}" height="16"/>',
            f'<text x="{LEFT + WIDE + 8}" y="{y + 17}">{result.ratio:.2f} {escape(result.bar)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _share(result: Result) -> float | None:
    """What part of its bar a result takes; for a bar that is to be exceeded, the inverse."""
    sign, _, bar = result.bar.partition(" ")
    try:
        limit = float(bar)
    except ValueError:
        return None
    if not result.ratio or not limit:
        return None
    return limit / result.ratio if sign.startswith(">") else result.ratio / limit
