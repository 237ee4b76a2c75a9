"""Which configuration to choose and why, in words that are made from the numbers alone.

The rule: of the configurations with privacy, take the smallest epsilon whose accuracy is within reach of the
best one's (two standard errors of the difference over the seeds that both have, but at least half a point and
at most two points), and among equals the cheapest. The text compares it with the same configuration without
privacy, where that was run, and names the site that loses most. Caveats name numbers that are too few or
contradict one another, and sites that took no part.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.report.difference import Difference, difference, site_difference
from fedtune.report.frontier import Point, Stat
from fedtune.report.words import describe_settings, format_money, format_number

__all__ = ["Advice", "advise", "family"]

_EPSILON = ("privacy.epsilon", "privacy.noise_multiplier")
_PRIVACY = (*_EPSILON, "privacy.trust", "privacy.max_grad_norm")


@dataclass(frozen=True)
class Advice:
    """The chosen point, its family by epsilon, and the text.

    Attributes:
        chosen: None if no configuration has privacy and a measured accuracy.
        family: points that differ from the chosen one in epsilon alone, smallest epsilon first.
        text: the paragraph.
        caveats: sentences about what the numbers do not support.
    """

    chosen: Point | None
    family: tuple[Point, ...]
    text: str
    caveats: tuple[str, ...]


def advise(points: Sequence[Point], names: Sequence[str], currency: str | None) -> Advice:
    """The advice on the points of one group; `names` are the settings that vary."""
    rated = [point for point in points if point.accuracy is not None]
    private = [point for point in rated if math.isfinite(point.epsilon)]
    if not private:
        return _without_privacy(rated, names)
    best = max(private, key=_mean)
    chosen = min(
        (point for point in private if point is best or _within_reach(best, point)),
        key=lambda point: (round(point.epsilon, 2), _price(point), -_mean(point)),
    )
    alike = family(chosen, rated)
    sentences = [_choice(chosen, names, currency), _neighbours(chosen, best, alike)]
    free = _reference(chosen, rated)
    if free is not None:
        lost = difference(free, chosen)
        sentences.append(
            f"Without any privacy the same configuration reaches {_points(free.accuracy)}: privacy costs "
            f"{lost.points()}."
            if lost.mean > 0
            else f"Without any privacy the same configuration reaches {_points(free.accuracy)}, which is not "
            "more: privacy costs no measurable accuracy."
        )
    sentences.append(_site_gap(chosen, free))
    text = " ".join(sentence for sentence in sentences if sentence)
    return Advice(chosen, tuple(alike), text, (*_absent(chosen, alike), *_caveats(private, alike)))


def family(point: Point, points: Sequence[Point]) -> list[Point]:
    """Points that differ from `point` in epsilon (and in having privacy at all) alone, smallest first."""
    own = _without(point)
    members = [
        other
        for other in points
        if _without(other) == own
        and other.group == point.group
        and (other.runs[0].trust == point.runs[0].trust or not other.runs[0].is_private)
    ]
    return sorted(members, key=lambda other: other.epsilon)


def _without(point: Point) -> dict[str, object]:
    return {name: value for name, value in point.settings.items() if name not in _PRIVACY}


def _mean(point: Point) -> float:
    assert point.accuracy is not None
    return point.accuracy.mean


def _price(point: Point) -> float:
    cost = point.costs["money"] or point.costs["train_seconds"]
    return math.inf if cost is None else cost.mean


def _within_reach(best: Point, point: Point) -> bool:
    gain = difference(best, point)
    return gain.mean <= min(0.02, max(0.005, 2.0 * (gain.error or 0.0)))


def _points(stat: Stat | None) -> str:
    if stat is None:
        return "-"
    error = "" if stat.error is None else f" ± {100 * stat.error:.1f}"
    return f"{100 * stat.mean:.1f}{error} percent"


def _choice(chosen: Point, names: Sequence[str], currency: str | None) -> str:
    first, money, seconds = chosen.runs[0], chosen.costs["money"], chosen.costs["train_seconds"]
    settings = describe_settings(chosen.settings, [name for name in names if name not in _EPSILON])
    cost = "" if money is None else f", for {format_money(money.mean, currency)} a run"
    time = "" if seconds is None else f" ({seconds.mean:.0f} s of training, summed over the nodes)"
    with_settings = f" with {settings}" if settings else ""
    return (
        f"Choose epsilon {format_number(chosen.epsilon)}{with_settings}: its accuracy is "
        f"{_points(chosen.accuracy)}{cost}{time}. The guarantee: {first.adjacency}, delta "
        f"{chosen.delta:.2g}, trust {first.trust}."
    )


def _neighbours(chosen: Point, best: Point, alike: Sequence[Point]) -> str:
    private = [point for point in alike if math.isfinite(point.epsilon)]
    place = private.index(chosen)
    parts = []
    if best is not chosen and best.epsilon > chosen.epsilon:
        gain = difference(best, chosen)
        parts.append(
            f"the most accurate configuration, at epsilon {format_number(best.epsilon)}, is "
            f"{gain.points()} better{_over(gain)}, "
            + (
                "which is within two standard errors"
                if gain.within(2.0)
                else "which is little for so much more epsilon"
            )
        )
    if place > 0:
        lower = private[place - 1]
        loss = difference(chosen, lower)
        parts.append(
            f"a smaller epsilon, {format_number(lower.epsilon)}, costs {loss.points()}{_over(loss)}"
            if loss.mean > 0
            else f"the same configuration at epsilon {format_number(lower.epsilon)} is no less accurate"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _over(found: Difference) -> str:
    """Over how many seeds two configurations were compared; empty where one seed is all there is."""
    return f" over {found.seeds} common seeds" if found.seeds > 1 else ""


def _reference(chosen: Point, rated: Sequence[Point]) -> Point | None:
    free = [point for point in family(chosen, rated) if not point.runs[0].is_private]
    return free[0] if free else None


def _site_gap(chosen: Point, free: Point | None) -> str:
    sites = {site: stat for site, stat in chosen.per_site.items() if site not in chosen.left_out}
    if len(sites) < 2:
        return ""
    worst, best = min(sites, key=lambda s: sites[s].mean), max(sites, key=lambda s: sites[s].mean)
    text = (
        f"The sites differ by {100 * (sites[best].mean - sites[worst].mean):.1f} points: "
        f"{worst} has {100 * sites[worst].mean:.1f} percent, {best} {100 * sites[best].mean:.1f}"
    )
    if free is not None and set(free.per_site) >= set(sites):
        lost = {site: site_difference(free, chosen, site) for site in sites}
        most = max(lost, key=lambda site: lost[site].mean)
        if lost[most].mean > 0.005:
            text += f"; {most} loses most by privacy ({lost[most].points()})"
    return text + "."


def _absent(chosen: Point, alike: Sequence[Point]) -> list[str]:
    """Who had no part in runs of the recommended configuration, or of those that it is compared with."""
    caveats = []
    others = [point for point in alike if point is not chosen]
    for where, points in (("recommended one", [chosen]), ("same configuration at other epsilons", others)):
        runs = sum(len(point.runs) for point in points)
        for site, count in Counter(site for point in points for site in point.left_out.elements()).items():
            caveats.append(
                f"{site} took no part in {count} of {runs} runs of the {where} (it refused, or nothing of it "
                f"arrived): what stands there as {site}'s accuracy is that of a model without its data."
            )
    return caveats


def _caveats(private: Sequence[Point], alike: Sequence[Point]) -> list[str]:
    caveats = []
    single = sum(point.accuracy is not None and point.accuracy.error is None for point in private)
    if single:
        caveats.append(
            f"{single} of {len(private)} private configurations were run with one seed, so the random error "
            "of their accuracy is not known. Repeat them with seed=0,1,2 before you decide."
        )
    for lower, higher in itertools.pairwise(alike):
        if higher.epsilon <= lower.epsilon:
            continue
        fall = difference(lower, higher)
        if fall.error is not None and fall.mean > 0 and not fall.within(2.0):
            caveats.append(
                f"Accuracy falls by {fall.points()} from epsilon {format_number(lower.epsilon)} to "
                f"{format_number(higher.epsilon)}, by more than two standard errors, although there is less "
                "noise. Find out why before you rely on it: learning rate and clipping norm may fit one "
                "epsilon only."
            )
    return caveats


def _without_privacy(rated: Sequence[Point], names: Sequence[str]) -> Advice:
    if not rated:
        return Advice(None, (), "No run has a measured accuracy, so nothing can be recommended.", ())
    best = max(rated, key=_mean)
    settings = describe_settings(best.settings, names)
    text = (
        f"None of these runs has privacy, so there is no trade-off to show. The highest accuracy is "
        f"{_points(best.accuracy)}{f' ({settings})' if settings else ''}. Run the same configuration with "
        "privacy.epsilon=1,2,4,8 to see what privacy would cost."
    )
    return Advice(None, tuple(family(best, rated)), text, ())
