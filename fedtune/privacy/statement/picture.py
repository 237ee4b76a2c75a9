"""The trade-off curve as a picture that a reader without mathematics understands (SVG, no library).

Left: a thousand units of the data, and how many of them an attacker recognises at most while he is wrong
about one in a thousand of the others. Right: the whole curve, what is out of reach, and guessing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedtune.privacy.accounting.strength import WRONG, TradeOff

__all__ = ["picture"]

_FOUND, _REST, _INK, _FAINT, _OUT = "#D55E00", "#DADADA", "#222222", "#666666", "#F3F3F3"
_WIDTH, _HEIGHT = 860, 420
_COLUMNS, _ROWS, _STEP, _SIDE = 40, 25, 10, 8
_LEFT, _TOP = 30, 110  # of the squares
_X, _Y, _EDGE = 540, 110, 250  # of the curve's square


def picture(curve: TradeOff, units: str, promise: str) -> str:
    """The picture of `curve` as SVG text. `units`: what is protected, in the plural; `promise`: the line of
    small print (epsilon, delta, adjacency)."""
    found = min(_COLUMNS * _ROWS, math.ceil(round(1000 * curve.found(WRONG[0]), 6)))
    told = f"recognises at most {found:,} of 1,000 {units} in it"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{_safe(f'Wrong about 1 in 1,000 of those not in the data, an attacker {told}')}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#FFFFFF"/>',
        _text(_LEFT, 34, "What an attacker can find out, at most", size=19, bold=True),
        _text(_LEFT, 68, "Wrong about 1 in 1,000 of those that were not in the data,"),
        _text(_LEFT, 88, f"he {told}", color=_FOUND, bold=True),
        _text(_LEFT, _TOP + _ROWS * _STEP + 18, "By guessing he would recognise 1.", size=12, color=_FAINT),
        _squares(range(found), _FOUND),
        _squares(range(found, _COLUMNS * _ROWS), _REST),
        *_curve(curve),
        _text(_LEFT, _HEIGHT - 16, promise, size=12, color=_FAINT),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _squares(which: Sequence[int], color: str) -> str:
    if not which:
        return ""
    at = ((_LEFT + i % _COLUMNS * _STEP, _TOP + i // _COLUMNS * _STEP) for i in which)
    path = "".join(f"M{x} {y}h{_SIDE}v{_SIDE}h-{_SIDE}z" for x, y in at)
    return f'<path d="{path}" fill="{color}"/>'


def _curve(curve: TradeOff) -> list[str]:
    shares = [0.0, *(10.0 ** (i / 10 - 4) for i in range(31)), *(i / 50 for i in range(6, 51))]
    points = [(wrong, curve.found(wrong)) for wrong in shares]
    line = " ".join(f"{_X + _EDGE * wrong:.1f},{_Y + _EDGE * (1 - found):.1f}" for wrong, found in points)
    bottom, right = _Y + _EDGE, _X + _EDGE
    return [
        f'<polygon points="{_X},{_Y} {line} {right},{_Y}" fill="{_OUT}"/>',
        f'<line x1="{_X}" y1="{bottom}" x2="{right}" y2="{_Y}" stroke="{_FAINT}" stroke-dasharray="4 4"/>',
        f'<polyline points="{line}" fill="none" stroke="{_FOUND}" stroke-width="2.5"/>',
        f'<path d="M{_X} {_Y}V{bottom}H{right}" fill="none" stroke="{_INK}"/>',
        _text(_X, 68, "However often he is wrong", size=14),
        _text(_X, 88, "found (upwards), wrong (to the right)", size=13, color=_FAINT),
        _text(_X + 8, _Y + 18, "out of reach", size=12, color=_FAINT) if curve.found(0.1) < 0.6 else "",
        _text(right - 8, bottom - 60, "guessing", size=12, color=_FAINT, anchor="end"),
        *(
            _text(_X - 8, bottom - _EDGE * i // 2 + 4, f"{50 * i} %", size=12, color=_FAINT, anchor="end")
            for i in range(3)
        ),
        *(
            _text(_X + _EDGE * i // 2, bottom + 18, f"{50 * i} %", size=12, color=_FAINT, anchor="middle")
            for i in range(3)
        ),
    ]


def _text(
    x: int, y: int, text: str, *, size: int = 14, color: str = _INK, bold: bool = False, anchor: str = "start"
) -> str:  # fmt: skip
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
        f"{_safe(text)}</text>"
    )


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
