"""Names as people and programs write them: when two spellings are one, and which stands for both.

What nobody sees (blanks, letters without width, Unicode forms), capitals and the writing of a whole number
make no other label, person or site.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

__all__ = [
    "INTEGER",
    "JOINED",
    "LOST",
    "SEVERAL",
    "as_label",
    "as_text",
    "column_name",
    "folded",
    "is_missing",
    "look_alikes",
    "one_spelling",
    "written_twice",
]

INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")  # that int() takes and gives back
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))\.0+")
_NUMBER = re.compile(r"\+?(-?(?:0|[1-9][0-9]{0,17}))(?:\.0+)?")
# Letters of full width, and the sign of a typeset minus -> ASCII's.
_NARROW = {0xFF01 + at: 0x21 + at for at in range(94)} | {0x2212: "-"}
_UNSEEN = re.compile(
    "[\\x00-\\x08\\x0e-\\x1f\\x7f\ufe00-\ufe0f]"
)  # control characters, how an emoji is drawn
# Cyrillic and Greek letters -> the Latin ones that most fonts draw the same.
_LATIN = str.maketrans(
    "аеорсухіјѕһԛԝӏ" + "АВЕКМНОРСТХУІЈЅԚԜӀ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ" + "ονρ",
    "aeopcyxijshqwl" + "ABEKMHOPCTXYIJSQWI" + "ABEZHIKMNOPTYX" + "ovp",
)
_DECIMAL = re.compile(r"[+-]?(?:(?:0|[1-9]\d{0,14})(?:\.\d{0,15})?|\.\d{1,15})(?:e[+-]?\d{1,2})?")
_TRUTH = {"true": "1", "false": "0"}
# Several labels in one text, as of a list or an array that a program wrote into a CSV.
SEVERAL = re.compile(
    r"\[\s*(?:['\"].*['\"]|[\d.,\s+-]*)\s*\]|\(\s*(?:['\"].*['\"]\s*,?|[\d.\s+-]+,[\d.,\s+-]*)\s*\)"
    r"|\{.*:.*\}|\{\s*['\"].*['\"]\s*\}",
    re.DOTALL,
)
JOINED = re.compile(r"\s*[|;,+&]\s*")  # between several labels that a person wrote into one field
LOST = frozenset(  # how programs write a value that is missing; as a class it must be declared
    {
        "nan",
        "NaN",
        "NAN",
        "<NA>",
        "#N/A",
        "N/A",
        "n/a",
        "NA",
        "null",
        "NULL",
        "None",
        "NaT",
        "#NULL!",
        "#REF!",
    }
)


def column_name(written: str) -> str:
    """A column's name without what nobody sees in a header: blanks around it, line ends, marks, and which
    Unicode form it has."""
    return unicodedata.normalize("NFC", " ".join(written.strip().strip("\ufeff\u200b").split()))


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing, or a number that is none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str:
    """A person or site as text: 3, 3.0 and True are what a spreadsheet would show."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value).strip())


def as_label(value: Any) -> str:
    """A label as text; `1.0`, written by a program that counts missing values as numbers, is 1."""
    key = as_text(value)
    whole = _WHOLE.fullmatch(key)
    return whole[1] if whole else key


def folded(label: str) -> str:
    """What a label is without what nobody sees: capitals (Turkish ones too), blanks, letters without width,
    full width, control characters, digits of another script; of a whole number, its value."""
    label = _UNSEEN.sub("", label)
    if label.isascii():
        plain = " ".join(label.casefold().split())
    else:
        letters = (letter for letter in label.translate(_NARROW) if unicodedata.category(letter) != "Cf")
        digits = (str(unicodedata.decimal(letter, letter)) for letter in letters)
        plain = " ".join("".join(digits).casefold().split())
        plain = plain.replace("i\u0307", "i").replace("\u0131", "i")
    whole = _NUMBER.fullmatch(plain)
    return whole[1] if whole else plain


def look_alikes(names: Iterable[str]) -> list[str]:
    """Those of `names` that look like another but for an alphabet, as with a Cyrillic а for an a; sorted."""
    drawn: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        drawn.setdefault(folded(name.translate(_LATIN)), []).append(name)
    return sorted(name for same in drawn.values() if len({folded(one) for one in same}) > 1 for name in same)


def written_twice(names: Iterable[str]) -> list[str]:
    """Those of `names` that are one number or truth value in two writings, sorted: such as 0.5 and 0.50; or
    True and 1, where there is nothing else than such.
    """
    forms = {name: folded(name) for name in set(names)}
    if any(form in _TRUTH for form in forms.values()) and all(
        form in {*_TRUTH, *_TRUTH.values()} for form in forms.values()
    ):
        forms = {name: _TRUTH.get(form, form) for name, form in forms.items()}
    values: dict[str | float, list[str]] = {}
    for name, form in forms.items():
        values.setdefault(float(form) if _DECIMAL.fullmatch(form) else form, []).append(name)
    return sorted(name for same in values.values() if len({*map(folded, same)}) > 1 for name in same)


def one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each name -> of all its spellings among `names` the one that stands for them: the plain one of a whole
    number, else whichever is first in the alphabet."""
    forms = {name: folded(name) for name in sorted(names, reverse=True)}
    first = {form: form if INTEGER.fullmatch(form) else name for name, form in forms.items()}
    return {name: first[form] for name, form in forms.items()}
