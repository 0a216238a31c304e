# SPDX-License-Identifier: Apache-2.0
"""Draw the phases of starts side by side, as SVG 1.1: one bar per start, one colour per phase."""

from collections.abc import Mapping, Sequence
from xml.sax import saxutils

from msgspec import Struct

_COLOURS = (
    *("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c"),
    *("#ccb974", "#64b5cd", "#1f3d66", "#f2b134", "#7fc97f", "#b30059", "#2f4f4f", "#9fb6cd"),
)
_LABEL, _BARS, _TAIL, _ROW = 220, 620, 120, 34
_WIDTH = _LABEL + _BARS + _TAIL
_TEXT = "font-family='sans-serif' font-size='13' fill='#222'"
_VISIBLE = 0.5  # the width of a phase that the legend names


class Bar(Struct, frozen=True, kw_only=True):
    """A start: its name, the seconds of each of its phases, and a note to write behind them."""

    name: str
    phases: Mapping[str, float]
    note: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def escape(text: str) -> str:
    """Escape text for XML, and replace the characters that XML cannot hold."""
    return saxutils.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def draw(title: str, bars: Sequence[Bar]) -> str:
    """Return the picture. Bars below a tenth of the longest are drawn again below, magnified."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.phases))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    longest = max((bar.seconds for bar in bars), default=0.0)
    short = [bar for bar in bars if bar.seconds < longest / 10]
    body = [f"<text x='12' y='28' {_TEXT} font-weight='bold'>{escape(title)}</text>"]
    top = _panel(body, bars, colours, 52, longest)
    largest = max((bar.seconds for bar in short), default=0.0)
    if largest:
        magnified = f"magnified {longest / largest:.0f} times"
        body.append(f"<text x='12' y='{top + 18}' {_TEXT} fill-opacity='0.7'>{magnified}</text>")
        top = _panel(body, short, colours, top + 34, largest)
    drawn = [(bar, longest) for bar in bars] + [(bar, largest) for bar in short]
    seen = {
        name
        for bar, scale in drawn
        for name, seconds in bar.phases.items()
        if _width(seconds, scale) >= _VISIBLE
    }
    height = _legend(body, {name: colour for name, colour in colours.items() if name in seen}, top + 14)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
        f"viewBox='0 0 {_WIDTH} {height}'>\n<rect width='100%' height='100%' fill='white'/>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _width(seconds: float, longest: float) -> float:
    return _BARS * seconds / longest if longest else 0.0


def _panel(body: list[str], bars: Sequence[Bar], colours: Mapping[str, str], top: int, longest: float) -> int:
    for bar in bars:
        body.append(f"<text x='12' y='{top + 17}' {_TEXT}>{escape(bar.name)}</text>")
        x = float(_LABEL)
        for name, seconds in bar.phases.items():
            width = _width(seconds, longest)
            body.append(
                f"<rect x='{x:.2f}' y='{top}' width='{width:.2f}' height='24' fill='{colours[name]}'>"
                f"<title>{escape(name)}: {seconds:.3f} s</title></rect>"
            )
            x += width
        note = f", {escape(bar.note)}" if bar.note else ""
        body.append(f"<text x='{x + 8:.2f}' y='{top + 17}' {_TEXT}>{bar.seconds:.2f} s{note}</text>")
        top += _ROW
    return top


def _legend(body: list[str], colours: Mapping[str, str], top: int) -> int:
    """Add the legend; return the height of the picture."""
    x = 12
    for name, colour in colours.items():
        width = 36 + 7 * len(name)
        if x + width > _WIDTH:
            x, top = 12, top + 22
        body.append(f"<rect x='{x}' y='{top}' width='14' height='14' fill='{colour}'/>")
        body.append(f"<text x='{x + 20}' y='{top + 12}' {_TEXT}>{escape(name)}</text>")
        x += width
    return top + 34
