"""Makes `visits.csv`: made-up notes of visits at four clinics, with the ward that each patient was sent to.

    python examples/make_visits.py

Nobody is in it. It is small enough to train on in seconds, and has what real files have: several records of
one patient, clinics that write in their own way, a label that a word alone does not give away.
"""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

FILE = Path(__file__).resolve().parent / "visits.csv"
CLINICS = ("harbour", "hill", "market", "station")
PATIENTS = 600

COMPLAINTS = {
    "cardiology": (
        "pressure in the chest on the stairs", "heart races at night", "short of breath when walking",
        "faint on standing up", "swollen ankles in the evening", "irregular pulse since spring",
        "pain that goes into the left arm",
    ),
    "orthopaedics": (
        "knee gives way on the stairs", "shoulder cannot be lifted", "back pain when sitting",
        "twisted ankle, cannot step on it", "hip hurts in the morning", "wrist swollen after a fall",
        "stiff neck since the accident",
    ),
    "dermatology": (
        "itching rash on both arms", "mole has changed its colour", "red patches on the face",
        "blisters after gardening", "dry skin that cracks", "hair falls out in circles",
        "spots that burn in the sun",
    ),
}  # fmt: skip
UNCLEAR = (
    "tired and cannot sleep", "tingling in one hand", "swollen foot", "pain under the left shoulder",
    "cold hands", "stabbing pain when breathing in", "skin is pale and cool", "lump on the back",
)  # fmt: skip
WARDS = tuple(COMPLAINTS)
SINCE = ("since yesterday", "for two weeks", "for months", "again", "since the holidays", "on and off")
ENDINGS = {
    "harbour": ("Please see.", "Referred today.", "Thanks for seeing this patient."),
    "hill": ("pt worried", "no fever", "meds unchanged"),
    "market": ("The patient asks for a second opinion.", "Nothing found so far.", "Blood test was normal."),
    "station": ("came without appointment", "works nights", "smoker"),
}


def visits() -> str:
    """The file's content, the same every time."""
    chance = random.Random(2026)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["patient", "clinic", "note", "ward"])
    for number in range(PATIENTS):
        clinic = CLINICS[number % len(CLINICS)]
        ward = chance.choices(WARDS, weights=(4, 4, 3))[0]
        for _ in range(chance.choice((1, 1, 2, 2, 3))):
            # Some complaints could be anybody's, and some notes are of something else than what was found.
            kind = chance.choices(("clear", "unclear", "other"), weights=(65, 25, 10))[0]
            said = {"clear": COMPLAINTS[ward], "unclear": UNCLEAR, "other": COMPLAINTS[chance.choice(WARDS)]}
            complaint, ending = chance.choice(said[kind]), chance.choice(ENDINGS[clinic])
            note = f"{complaint.capitalize()} {chance.choice(SINCE)}. {ending}"
            rows.writerow([f"P{1000 + number}", clinic, note, ward])
    return text.getvalue()


if __name__ == "__main__":
    FILE.write_text(visits(), encoding="utf-8")
