"""Where everything lies in the picture of the trade-off curve."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from fedtune.privacy.accounting.strength import TradeOff
from fedtune.privacy.statement.picture import picture

SVG = "{http://www.w3.org/2000/svg}"
CURVE = TradeOff(((2.0, 1e-5), (1.0, 0.05)), own=True)
WEAK = TradeOff(((9.0, 1e-5),), own=False)
INK, FAINT, FOUND = "#222222", "#666666", "#D55E00"


def drawn(curve: TradeOff, kind: str, promise: str = "promise") -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture(curve, "persons", promise)).findall(f"{SVG}{kind}")


def texts(curve: TradeOff) -> set[tuple[str | None, ...]]:
    names = ("x", "y", "font-size", "fill", "text-anchor", "font-weight")
    return {(*(one.get(name) for name in names), one.text) for one in drawn(curve, "text")}


def test_what_is_written_where() -> None:
    out_of_reach = ("548", "128", "12", FAINT, "start", None, "out of reach")
    assert texts(CURVE) == {
        ("30", "34", "19", INK, "start", "bold", "What an attacker can find out, at most"),
        ("30", "68", "14", INK, "start", None, "Wrong about 1 in 1,000 of those that were not in the data,"),
        ("30", "88", "14", FOUND, "start", "bold", "he recognises at most 8 of 1,000 persons in it"),
        ("30", "378", "12", FAINT, "start", None, "By guessing he would recognise 1."),
        ("30", "404", "12", FAINT, "start", None, "promise"),
        ("540", "68", "14", INK, "start", None, "However often he is wrong"),
        ("540", "88", "13", FAINT, "start", None, "found (upwards), wrong (to the right)"),
        ("782", "300", "12", FAINT, "end", None, "guessing"),
        ("532", "364", "12", FAINT, "end", None, "0 %"),
        ("532", "239", "12", FAINT, "end", None, "50 %"),
        ("532", "114", "12", FAINT, "end", None, "100 %"),
        ("540", "378", "12", FAINT, "middle", None, "0 %"),
        ("665", "378", "12", FAINT, "middle", None, "50 %"),
        ("790", "378", "12", FAINT, "middle", None, "100 %"),
        out_of_reach,
    }
    assert out_of_reach not in texts(WEAK)


def test_what_is_out_of_reach_is_named_where_there_is_room() -> None:
    def says(found: float) -> bool:
        curve = TradeOff(((0.0, found - 0.1),), own=True)
        assert curve.found(0.1) == pytest.approx(found)
        return any(text[-1] == "out of reach" for text in texts(curve))

    assert says(0.59) and not says(0.61)


def squares(curve: TradeOff) -> list[tuple[str | None, list[tuple[int, int]]]]:
    found = []
    for one in drawn(curve, "path"):
        path = one.get("d") or ""
        if path.startswith("M540 "):
            continue
        at = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h8v8h-8z", path)]
        assert "".join(f"M{x} {y}h8v8h-8z" for x, y in at) == path
        found.append((one.get("fill"), at))
    return found


def test_a_thousand_squares_row_by_row() -> None:
    every = [(30 + 10 * column, 110 + 10 * row) for row in range(25) for column in range(40)]
    assert squares(CURVE) == [(FOUND, every[:8]), ("#DADADA", every[8:])]
    assert squares(TradeOff((), own=False)) == [(FOUND, every)]


def test_squares_are_counted_upwards_but_not_for_a_rounding_error() -> None:
    assert len(squares(TradeOff(((0.0, 0.049 + 1e-10),), own=True))[0][1]) == 50
    assert len(squares(TradeOff(((0.0, 0.049 + 1e-8),), own=True))[0][1]) == 51


def test_the_curve_goes_through_what_is_found() -> None:
    (line,) = drawn(CURVE, "polyline")
    shares = [0.0, *(10.0 ** (i / 10 - 4) for i in range(31)), *(i / 50 for i in range(6, 51))]
    points = line.get("points") or ""
    assert points.split() == [
        f"{540 + 250 * wrong:.1f},{110 + 250 * (1 - CURVE.found(wrong)):.1f}" for wrong in shares
    ]
    assert (line.get("fill"), line.get("stroke"), line.get("stroke-width")) == ("none", FOUND, "2.5")
    (out,) = drawn(CURVE, "polygon")
    assert out.get("points") == f"540,110 {points} 790,110" and out.get("fill") == "#F3F3F3"


def test_the_axes_and_guessing() -> None:
    (guessing,) = drawn(CURVE, "line")
    assert [guessing.get(name) for name in ("x1", "y1", "x2", "y2", "stroke")] == [
        "540", "360", "790", "110", FAINT
    ]  # fmt: skip
    axes = [one for one in drawn(CURVE, "path") if one.get("fill") == "none"]
    assert [(one.get("d"), one.get("stroke")) for one in axes] == [("M540 110V360H790", INK)]


def test_its_size_and_ground() -> None:
    text = picture(CURVE, "persons", "promise")
    root = ElementTree.fromstring(text)
    assert [root.get(name) for name in ("viewBox", "width", "height")] == ["0 0 860 420", "860", "420"]
    (ground,) = drawn(CURVE, "rect")
    assert [ground.get(name) for name in ("width", "height", "fill")] == ["860", "420", "#FFFFFF"]
    assert text.endswith("</text>\n</svg>\n") and "\n\n" not in picture(WEAK, "persons", "promise")


def test_small_print_cannot_break_out() -> None:
    assert drawn(CURVE, "text", "a < b > c & d")[-1].text == "a < b > c & d"
    assert "a &lt; b &gt; c &amp; d</text>" in picture(CURVE, "persons", "a < b > c & d")
