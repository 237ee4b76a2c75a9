"""What a compressed folder's README says of its compression, made of `compression.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.privacy.statement.markdown import bullets, coded, plain, table
from fedtune.runs.summary import human_bytes

__all__ = ["compressed_card", "encoder_card", "points"]

_BEFORE = "## How right it is"


def compressed_card(page: str, about: Mapping[str, Any]) -> str:
    """The model card `page` of an export with what was done to the model, before how right it is."""
    own = "\n\n".join(["## How it was made smaller", *_compression(about)])
    before, _, after = page.partition(_BEFORE)
    said = (
        "Figures by the run's record are of the model before it was compressed; those of texts are of the "
        "compressed one."
    )
    return f"{before}{own}\n\n{_BEFORE}\n\n{said}{after}"


def encoder_card(about: Mapping[str, Any]) -> str:
    """README.md of a compressed base encoder."""
    parts = [
        "# A smaller encoder",
        f"Made of {coded(about['base']['name'])} by fedtune {about['fedtune']}; no private text was used. "
        "Train a classifier on it in a federation: `fedtune run model.name=FOLDER`.",
        "## How it was made smaller",
        *_compression(about),
        "## Files",
        "`compression.json` says all of this for programs. `sha256sum -c SHA256SUMS` tells whether a file "
        "was changed. What the base learnt from its own training data is still in it.",
    ]
    return "\n\n".join(parts) + "\n"


def _compression(about: Mapping[str, Any]) -> list[str]:
    original, texts = about["original"], about["texts"]
    of_run = "accuracy" in original
    rows = []
    for name, one in (
        ("original, torch", original),
        *((f"{step['step']}, torch", step) for step in about["steps"]),
        *((f"`{name}`", one) for name, one in about["formats"].items()),
    ):
        says = (
            [f"{one['accuracy']:.1%}", points(one), f"{one['labels_equal']:.1%}"]
            if of_run
            else [f"{one['cosine']:.4f}"]
        )
        rows.append([name, human_bytes(one["bytes"]), f"{one['ratio']:.2f}x", *says])
    head = ["", "size", "texts a second", *(["accuracy", "points", "labels equal"] if of_run else ["cosine"])]
    fewest = (
        "Points are those of accuracy beside the original, on the same texts, with the standard error of the "
        "difference."
        if of_run
        else "The cosine is that between mean token states of the two encoders."
    )
    return [
        bullets(
            [
                *(f"{plain(step['what'][:1].upper() + step['what'][1:])}." for step in about["steps"]),
                f"Learnt from {texts['num_learn']:,} texts: {plain(texts['learn_from'])}. No label of them "
                "was looked at.",
                f"Measured on {texts['num_measured']:,} texts: {plain(texts['measured_on'])}.",
                *map(plain, texts["notes"]),
                *([about["privacy"]] if about["privacy"] else []),
            ]
        ),
        table(head, rows),
        f"{fewest} Texts a second are beside the original in torch, float32, all in turn in one process, "
        f"with {about['settings']['threads']} thread(s) on a processor with {about['processor']}.",
    ]


def points(one: Mapping[str, Any]) -> str:
    """The difference of accuracy in points, with its standard error."""
    return f"{100 * one['difference']:+.1f} ± {100 * one['difference_error']:.1f}"
