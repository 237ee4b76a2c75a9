"""`fedtune audit RUN_DIR`: an empirical lower bound on epsilon beside the one that the run claims.

    1  the plan, made again from the record's configuration, declared sizes, noise and delta
    2  the audit of as many releases as the node with most of them made (`fedtune.audit.attack`)
    3  `privacy.audit` of record.json, statement.md anew, audit.png
    4  `check`: above the claim is an `AuditError`, after everything is written

The plan is made from what the record says was done, and the claim is what it says was promised; if they
disagree (a record that was edited, an accountant that forgot a round) that is an `AuditError` too.

Does not do: touch private data, the ledger, or the run's adapter.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import AuditError, RecordError
from fedtune.privacy.mechanisms.registry import adds_noise
from fedtune.runs import record

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.audit.attack import AuditResult
    from fedtune.config.schema import Config
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["FIGURE", "audit", "check", "draw", "plan_of"]

FIGURE = "audit.png"


def audit(
    run_dir: Path | str,
    *,
    canaries: int | None = None,
    seeds: int = 1,
    confidence: float = 0.95,
    model: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Audits the run in `run_dir`; what `privacy.audit` of its record holds from now on.

    Args: `canaries` a repetition (None: by what is audited), `seeds` repetitions, `model`: train the real
    model rather than run the mechanism alone; `console`: where to tell of it, None: nowhere. Whether the
    claim stands is for `check`. Raises `RecordError`, `PrivacyError` for numbers that allow no audit, and
    whatever a run raises where the model is trained.
    """
    from fedtune.audit.attack import audit_mechanism, audit_model

    finished = record.read(run_dir)
    folder = record.run_folder(run_dir)
    if not (folder / record.RECORD_NAME).is_file():
        raise RecordError(
            f"{run_dir} is a record outside of its run folder, and an audit is written beside it: put "
            f"it into a folder of its own as {record.RECORD_NAME}, and name that folder."
        )
    config, plan, releases = plan_of(finished)
    options: dict[str, Any] = {
        "claimed": finished["privacy"]["epsilon"],
        "canaries": canaries,
        "repeats": seeds,
        "confidence": confidence,
        "progress": _progress(console, "rounds" if model else "repetitions"),
    }
    if model:
        result = audit_model(config, plan, releases, **options)
    else:
        result = audit_mechanism(plan, releases, **options)
    found = result.to_json()
    _keep(folder, found, draw(result))
    if console is not None:
        _show(found, folder, console)
    return found


def plan_of(finished: Mapping[str, Any]) -> tuple[Config, PrivacyPlan, int]:
    """(configuration, plan, releases) of a record: those of the node with the most releases.

    Raises `RecordError` if the record does not have what a plan is made of.
    """
    from fedtune.config.convert import from_dict
    from fedtune.errors import ConfigError, PrivacyError
    from fedtune.privacy.plan import make_plan

    privacy = finished["privacy"]
    try:
        config = from_dict(dict(finished["config"]))
        sizes = dict(finished["data"]["declared_sizes"])
        most = max(privacy["per_node"], key=lambda one: one["releases"])
        chosen = dataclasses.replace(
            config.privacy,
            epsilon=None,
            noise_multiplier=privacy["noise_multiplier"] if adds_noise(privacy["trust"]) else None,
            delta=privacy["delta"],
        )
        # What is audited is the training; what evaluation costs beside it only adds to the claim.
        federation = dataclasses.replace(config.federation, evaluation="none")
        training = dataclasses.replace(config, privacy=chosen, federation=federation)
        plan = make_plan(training, list(sizes.values()))
        size = sizes.get(most["node"], plan.declared_size)
        return config, plan.for_shard(size), int(most["releases"])
    except (KeyError, TypeError, ValueError, ConfigError, PrivacyError) as error:
        raise RecordError(
            f"No plan can be made from this record ({type(error).__name__}: {error}). Audit the "
            "record.json of a finished run, with the version of fedtune that wrote it."
        ) from error


def check(found: Mapping[str, Any]) -> None:
    """Raises `AuditError`, loudly, if what `audit` found convicts the claim."""
    if not found["violated"]:
        return
    promise = f"epsilon {found['epsilon_claimed']:.4g} at delta {found['delta']:.3g} ({found['adjacency']})"
    if found["epsilon_lower"] <= found["epsilon_claimed"]:
        raise AuditError(
            f"THE CLAIM IS TOO LOW. This run promises {promise}, and its own plan comes to epsilon "
            f"{found['epsilon_accounted'] or float('inf'):.4g} for the {found['releases']} releases that it "
            "made. The record was edited, or the accountant left releases out: do not publish the claim."
        )
    best = max(found["bounds"], key=lambda bound: bound["epsilon_lower"])
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in best["counts"].items())
    raise AuditError(
        f"THE GUARANTEE DOES NOT HOLD. This run promises {promise}, and an attack on its {found['audited']} "
        f"shows that epsilon is at least {best['epsilon_lower']:.4g} there, with "
        f"{100 * found['confidence']:g} percent confidence (by the {best['method']} bound: {counts}; it "
        f"assumes {best['assumes']}). Do not publish what it trained. Repeat the audit with other --canaries "
        f"to rule out bad luck, of which there is one chance in {1.0 / (1.0 - found['confidence']):.0f} at "
        "most; then look for noise, clipping, sampling or accounting that is not the plan's."
    )


# --- inside --------------------------------------------------------------------------------------


def _keep(folder: Path, found: dict[str, Any], figure: bytes) -> None:
    """Writes record, statement and figure. The record is read anew: an audit may have taken minutes."""
    written = record.read(folder)
    written["privacy"]["audit"] = found
    written["artifacts"]["audit"] = FIGURE
    (folder / FIGURE).write_bytes(figure)
    record.write(written, folder / record.RECORD_NAME)
    record.write_statement(written, folder / written["artifacts"]["statement"])


def _progress(console: Console | None, what: str) -> Any:
    if console is None:
        return None

    def shown(done: int, total: int) -> None:
        if total > 1:
            console.print(f"  {done} of {total} {what}", style="dim")

    return shown


def _show(found: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The bounds beside the claim, each with its assumptions."""
    from rich.table import Table

    claimed, delta = found["epsilon_claimed"], found["delta"]
    of = f"delta {delta:.2e}, {found['adjacency']}" if delta else found["adjacency"]
    table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left")
    table.add_column("epsilon", justify="right", no_wrap=True)
    table.add_column(f"at {of}", overflow="fold")
    name = "infinite" if claimed is None else f"= {claimed:.3f}"
    table.add_row(name, "claimed: upper bound of the accountant", style="bold")
    for bound in sorted(found["bounds"], key=lambda one: -one["epsilon_lower"]):
        table.add_row(f">= {bound['epsilon_lower']:.3f}", f"{bound['method']}; assumes {bound['assumes']}")
    if found["estimate"] is not None:
        value = found["estimate"]["epsilon"]
        table.add_row("?" if value is None else f"~ {value:.3f}", found["estimate"]["method"], style="dim")
    console.print(table)
    console.print(
        f"Lower bounds, together with {100 * found['confidence']:g} percent confidence, from "
        f"{found['repeats']} x {found['canaries']:,} canaries over {found['steps']} steps of the "
        f"{found['audited']}. A bound above the claim proves it wrong; one below proves nothing.\n"
        f"Private data used: {found['private_data']}.",
        style="dim",
    )
    console.print(f"figure {folder / FIGURE}; also in privacy.audit of record.json, and in statement.md")


def draw(result: AuditResult) -> bytes:
    """audit.png: how well canaries are told apart, against what the claim allows; and the bounds."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fedtune.audit.verdict import limit

    figure = Figure(figsize=(9.6, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
    ins, outs = int(result.included.sum()), int((~result.included).sum())
    rates = np.geomspace(1.0 / max(outs, 2), 1.0, 120)
    for color, (name, scores) in zip(_COLORS, result.scores.items(), strict=False):
        order = result.included[np.argsort(-scores, kind="stable")]
        hits, false = np.cumsum(order) / max(ins, 1), np.cumsum(~order) / max(outs, 1)
        left.step(false, hits, where="post", color=color, lw=1.3, label=f"attack: {name}")
    terms = result.plan.terms(result.releases)
    if terms:
        top = limit(terms, rates)
        left.plot(rates, top, color="black", lw=1.6, label="most that the claim allows")
        left.fill_between(rates, top, 1.0, color="black", alpha=0.06, lw=0)
    left.plot(rates, rates, color="#999999", ls=":", lw=1, label="guessing")
    left.set(xscale="log", yscale="log", xlim=(rates[0], 1.0), ylim=(rates[0], 1.3))
    left.set_xlabel("share of absent canaries called present")
    left.set_ylabel("share of present canaries found")
    left.set_title("How well canaries are told apart", loc="left", fontsize=11, fontweight="bold")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    _bars(right, result)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    plan = result.plan
    figure.supxlabel(
        f"{result.audited}, {result.repeats} x {result.canaries:,} canaries, {plan.steps(result.releases)} "
        f"steps; delta {plan.delta:.2e}, {plan.adjacency()}; all bounds together at "
        f"{100 * result.confidence:g} % confidence",
        fontsize=7.5,
        color="#555555",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


_COLORS = ("#0072B2", "#D55E00", "#009E73")
_BARS = {
    "one-run": "one-run\n(any mechanism)",
    "two-sample": "two-sample\n(independent canaries)",
    "curve": "curve\n(the plan's family)",
    "one-run, input canaries": "one-run, mislabelled\nrecords, final model",
}


def _bars(axes: Any, result: AuditResult) -> None:
    bounds = sorted(result.bounds, key=lambda bound: bound.epsilon_lower)
    names = [_BARS[bound.method] for bound in bounds]
    values = [bound.epsilon_lower for bound in bounds]
    bars = axes.barh(names, values, color="#0072B2", height=0.5)
    labels = [f"at least {value:.2f}" for value in values]
    for label in axes.bar_label(bars, labels, padding=4, fontsize=9):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    most = max([*values, result.claimed or 0.0, 0.1])
    if result.claimed is not None:
        axes.axvline(result.claimed, color="black", lw=1.6)
        axes.annotate(
            f"claimed: at most {result.claimed:.2f}",
            (result.claimed, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
        )
    axes.set_xlim(0, 1.3 * most)
    axes.set_ylim(-0.6, len(bounds) - 0.4)
    axes.set_xlabel("epsilon")
