"""One run, from a configuration to a record: what `fedtune run` does.

    1. save the configuration (a run that is killed can then be resumed)
    2. tokenizer and data: fetched, tokenised, cut into shards (a simulation holds all shards; a node its own)
    3. the federation: the plan is calibrated from public sizes before any shard is trained on, then rounds
    4. evaluation of the last adapter: on a test part, by the nodes on their own data, or not at all
    5. adapter in PEFT's format, statement, and last of all record.json: a folder with a record is finished

Everything that trains, accounts or sends is elsewhere; this module only puts the parts in order, and reads
what came of it (the engine's result, the nodes' ledgers, the meter) into the record.

Ctrl-C raises `Interrupted`, a KeyboardInterrupt whose text says how to go on; a full disk is a
`ResourceError`. Does not do: sweeps (`fedtune.cli.app` starts a run per job), real nodes
(`fedtune.deploy`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import FederationError, ResourceError
from fedtune.federation import run_folder
from fedtune.federation.events import StoppingObserver
from fedtune.privacy.publication import merge, publish
from fedtune.runs import assemble, environment, history, record

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.config.schema import Config, ModelConfig
    from fedtune.cost.meter import Meter
    from fedtune.federation.events import FederationResult, Observer, RoundSummary, StopRule
    from fedtune.federation.resources import RunResources
    from fedtune.federation.server.evaluation import NodesEvaluation
    from fedtune.models.classifier import AdaptedModel
    from fedtune.runs.display import Display
    from fedtune.runs.personal import PersonalScore
    from fedtune.runs.trackers import Tracker
    from fedtune.training.evaluation import Evaluation

__all__ = ["Interrupted", "run"]

ADAPTER, STATEMENT = "adapter", "statement.md"


class Interrupted(KeyboardInterrupt):
    """The person pressed Ctrl-C; the text says what was kept and how to go on. Exit status 130."""


def run(
    config: Config,
    *,
    console: Console | None = None,
    view: Display | None = None,
    stop_rule: StopRule | None = None,
) -> Path:
    """Runs `config` to its end and returns the path of its record.json.

    Files go below `config.output` (made if missing; `outputs/<date>/<time>` if it is None). With
    `config.resume` the run in that folder goes on from its checkpoint.

    Args:
        console: where progress and summary are shown; None: the standard output.
        view: shows the progress instead, and then there is no summary (a sweep has its own line a run).
        stop_rule: says after each round whether to go on; a run that is given up has a record.

    Raises:
        FedtuneError: any of its kinds, one paragraph each.
        Interrupted: Ctrl-C; the checkpoint is kept.
    """
    from rich.console import Console

    from fedtune.config.choices import resolved
    from fedtune.cost import prices
    from fedtune.cost.meter import Meter
    from fedtune.runs import trackers
    from fedtune.runs.display import Display
    from fedtune.runs.summary import summary

    config = resolved(config)
    prices.check(config.pricing)
    trackers.check(config)
    console = console or Console(highlight=False)
    run_dir = _folder(config)
    config = dataclasses.replace(config, output=str(run_dir), model=_placed(config.model))
    shown = view or Display(_title(config), unit=config.privacy.unit, console=console)
    tracker = trackers.open_tracker(config, run_dir)
    with _failures(run_dir, shown, tracker), Meter(children=config.engine.name == "ray") as meter:
        written = _work(config, run_dir, shown, meter, tracker, stop_rule)
    whole = _for_owner(written, run_dir)
    history.note_run(whole)
    if view is None and not console.is_jupyter:  # a notebook shows the result itself
        summary(whole, _shown(run_dir), console, trackers.where_written(config, run_dir))
    return run_dir / record.RECORD_NAME


# --- the steps -----------------------------------------------------------------------------------


def _folder(config: Config) -> Path:
    """Makes the run folder; returns its absolute path."""
    chosen = config.resume or config.output
    if chosen is None:
        chosen = str(Path("outputs") / datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S"))
    folder = Path(chosen).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"The run folder {folder} cannot be made: {error.strerror or error}. Choose another with "
            "hydra.run.dir=FOLDER."
        ) from error
    return folder


def _placed(model: ModelConfig) -> ModelConfig:
    """`model` with its folder, if it is one, as an absolute path: who predicts later stands somewhere "
    "else."""
    folder = Path(model.name).expanduser()
    return dataclasses.replace(model, name=str(folder.absolute())) if folder.is_dir() else model


def _title(config: Config) -> str:
    where = (
        config.data.name
        if config.data.only_site is None
        else f"{config.data.name} ({config.data.only_site} alone)"
    )
    encoder = config.model.name.removeprefix("embedded:").rstrip("/").rsplit("/", 1)[-1]
    quantization = "" if config.model.quantization == "none" else f" {config.model.quantization}"
    model = f"{encoder}{quantization} with {config.adapter.name}"
    return f"fedtune: {where}, {config.partition.name} partition; {model}"


def _work(
    config: Config,
    run_dir: Path,
    view: Display,
    meter: Meter,
    tracker: Tracker,
    stop_rule: StopRule | None = None,
) -> dict[str, Any]:
    """Steps 1 to 5; returns the record."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # The commit is read now: the code that runs is the one that was imported, not what is there at the end.
    commit = environment.commit()
    from fedtune import engines
    from fedtune.federation.events import Observers
    from fedtune.federation.resources import run_resources
    from fedtune.runs.check import plan_of, with_length

    view.working("loading tokenizer and data")
    config, said = with_length(config)
    if config.resume is None and not (run_dir / "checkpoint").exists():
        from fedtune.config.loader import save_config

        save_config(config, run_dir)
    resources = run_resources(config)
    data = resources.prepared  # here rather than in the engine, so that the display says what takes the time
    begins = config.resume is None
    view.working("calibrating the noise")
    if begins:
        # A run that no noise or no number of nodes allows is refused before minutes go into frozen layers.
        plan_of(config, data)
    view.working("loading the encoder")
    texts = resources.public_texts if begins else None  # else the checkpoint has what they taught
    with resources.using_model() as model:
        view.notes([*said, *data.notes, *(texts.notes if texts else ()), *model.notes])  # before any charge

    def warming(done: int, total: int) -> None:
        view.counting("frozen layers, once and kept", done, total)

    # Before the rounds: no node's deadline then waits for it, and one can see what takes the time.
    resources.warm(warming)
    if texts is not None:
        view.working(f"training on {texts.corpus.num_records:,} public texts")
        resources.initial(partial(view.counting, "public texts"))
    view.working("asking the nodes")
    observer: Observer = Observers(_ForOwner(view, run_dir), tracker)
    if stop_rule is not None:
        observer = StoppingObserver(observer, stop_rule)
    result = engines.run(config, run_dir, observer)
    result.notices += said
    view.working("saving adapter, statement and record")
    return finish(config, run_dir, result, meter, started=started, commit=commit, tracker=tracker)


def finish(
    config: Config,
    run_dir: Path,
    result: FederationResult,
    meter: Meter,
    *,
    started: str | None = None,
    commit: tuple[str | None, bool | None] | None = None,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Writes adapter, statement and, last of all, record of a federation that has ended; returns the record
    as it is published.

    Flower's ServerApp calls this by name (the run config's `finish`), so that `flwr run` leaves what
    `fedtune run` does.
    """
    from fedtune.config.choices import tests_openly
    from fedtune.federation.resources import run_resources
    from fedtune.runs.measures import noise_line
    from fedtune.runs.personal import finish_parts
    from fedtune.runs.trackers import open_tracker

    # What was not given and could not be chosen is what everybody took in its place.
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, max_length=config.data.longest)
    )
    resources = run_resources(config)
    evaluation = result.evaluation
    if evaluation is None and tests_openly(config):
        evaluation = resources.evaluate(result.adapter)
    resources.save(result.adapter, run_dir / ADAPTER)
    own_parts = finish_parts(config, resources, result, run_dir)
    meter.stop()
    with resources.using_model() as model:
        result.notices += model.notes
    if (drowned := noise_line(result, len(result.adapter))) is not None:
        result.notices.append(drowned)
    started = started or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with resources.using_model() as model:
        made = _record(
            config,
            resources,
            model,
            result,
            evaluation,
            own_parts,
            meter,
            started,
            commit or environment.commit(),
        )
    run_folder.collect_reasons(run_dir)
    written, _ = publish("record", made, public_data=resources.prepared.public)
    statement = record.write_statement(written, run_dir / STATEMENT)
    record.publish(made, run_dir)
    (tracker or open_tracker(config, run_dir)).finish(written, result, statement)
    if config.engine.name == "deployment":
        from fedtune.deploy.submit import report_statement

        report_statement(config, run_dir, statement)
    return written


def _record(
    config: Config,
    resources: RunResources,
    model: AdaptedModel,
    result: FederationResult,
    evaluation: Evaluation | NodesEvaluation | None,
    own_parts: Mapping[str, PersonalScore] | None,
    meter: Meter,
    started: str,
    commit: tuple[str | None, bool | None],
) -> dict[str, Any]:
    from fedtune.cost.prices import carbon_kg, price
    from fedtune.federation.events import PRUNED
    from fedtune.models.encoder import computes_in
    from fedtune.runs import measures

    data = resources.prepared
    parts = {run_folder.PERSONAL: run_folder.PERSONAL} if own_parts and data.public else {}
    energy = measures.energy_of_run(meter.energy, result.attempt)
    cost = meter.cost(
        train_seconds=result.train_seconds,
        flops=result.flops,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
    )
    # Nodes of private data report no seconds: 0.0 is then unknown, and so is what they would cost.
    unknown = result.train_seconds == 0.0 and not data.public
    trained = None if unknown else result.train_seconds
    cost = dataclasses.replace(cost, train_seconds=trained, energy_kwh=energy.kwh)
    return assemble.assemble(
        config=config,
        facts=assemble.RunFacts(
            id=result.run,
            started=started,
            # A resumed run took what its earlier sessions took, too.
            seconds=max(result.seconds, meter.seconds),
            engine=config.engine.name,
            seed=config.seed,
            versions=environment.versions(),
            commit=commit[0],
            dirty=commit[1],
            hardware=environment.hardware(
                str(model.device), computes_in(model.device, config.train.precision)
            ),
            status="pruned" if (result.ended_early or "").startswith(PRUNED) else "finished",
            attempt=result.attempt,
        ),
        result=result,
        nodes=measures.node_privacy(data.shards, result),
        metrics=measures.metrics(evaluation, data.test, config.federation.evaluation, own_parts),
        data=measures.data_facts(config, data, result, resources.public_notes),
        cost=cost,
        energy=energy,
        money=price(config.pricing, cost, records=measures.bought_records(result)),
        carbon_kg=carbon_kg(config.pricing, cost),
        memory_note=meter.peak_memory_note,
        encoder_bytes=model.encoder_bytes,
        adapter_bytes=model.adapter_bytes,
        num_parameters=model.num_parameters,
        expected_flops=None if data.public else measures.expected_flops(config, result, model),
        artifacts={"adapter": ADAPTER, "statement": STATEMENT, **parts},
        accountant=measures.accountant(result.plan),
        evaluation=measures.evaluation_facts(result.plan),
        sizes=measures.size_facts(result.plan),
    )


class _ForOwner(StoppingObserver):
    """Shows the person at the keyboard what is kept from everybody else: why an answer was lost."""

    def __init__(self, view: Observer, run_dir: Path) -> None:
        super().__init__(view, lambda summary: None)
        self._run_dir, self._view = run_dir, view

    def on_client(self, node: str, status: str) -> None:
        """See `Observer`."""
        self._view.on_client(node, run_folder.restore_reasons(self._run_dir, status))

    def on_round(self, summary: RoundSummary) -> str | None:
        """See `Observer`."""
        lost = [(node, run_folder.restore_reasons(self._run_dir, reason)) for node, reason in summary.dropped]
        return self._view.on_round(dataclasses.replace(summary, dropped=lost))


def _for_owner(written: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The record with what only the owner of the data is told, for the terminal."""
    whole: dict[str, Any] = merge(written, run_folder.read_local(run_dir).get("record"))
    federation = dict(whole["federation"])
    federation["dropped"] = [
        {**one, "reason": run_folder.restore_reasons(run_dir, one["reason"], one["round"])}
        for one in federation["dropped"]
    ]
    federation["left_out"] = [
        {**one, "reason": run_folder.restore_reasons(run_dir, one["reason"])}
        for one in federation["left_out"]
    ]
    federation["ended_early"] = run_folder.restore_reasons(run_dir, federation["ended_early"] or "") or None
    notes = [note for note in whole["data"]["notes"] or [] if note not in whole["privacy"]["cautions"]]
    return {
        **whole,
        "federation": federation,
        "privacy": {**whole["privacy"], "cautions": [*whole["privacy"]["cautions"], *notes]},
    }


# --- what goes wrong -----------------------------------------------------------------------------


@contextlib.contextmanager
def _failures(run_dir: Path, view: Display, tracker: Tracker) -> Iterator[None]:
    """Leaves the terminal clean whatever happens, and turns Ctrl-C and a full disk into words."""
    try:
        yield
    except KeyboardInterrupt as error:
        view.close()
        raise Interrupted(_interrupted(run_dir)) from error
    except FederationError as error:
        raise type(error)(run_folder.restore_reasons(run_dir, str(error)), public=False) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = error.filename or run_dir
        raise ResourceError(
            f"The run in {run_dir} stopped: {error.strerror} ({where}). What was checkpointed is kept; "
            f"make room or give permission, then go on with: {_resume_command(run_dir)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the second is torch's, of a GPU
            raise
        raise ResourceError(
            f"The run in {run_dir} ran out of memory. Lower train.micro_batch_tokens, take a smaller "
            f"model or model.quantization=int8, then go on with: {_resume_command(run_dir)}"
        ) from error
    finally:
        view.close()
        tracker.close()


def _interrupted(run_dir: Path) -> str:
    from fedtune.federation.server.checkpoint import has_checkpoint

    if has_checkpoint(run_dir):
        return (
            f"Interrupted. Finished rounds are saved; go on with: {_resume_command(run_dir)} (the round "
            "that was interrupted counts as released by the nodes that it had charged)"
        )
    return f"Interrupted before the first round began; {_shown(run_dir)} holds nothing to resume from."


def _resume_command(run_dir: Path) -> str:
    return f"fedtune run resume={shlex.quote(str(_shown(run_dir)))}"


def _shown(run_dir: Path) -> Path:
    """The folder as a person would type it: relative where it lies below the working folder."""
    with contextlib.suppress(ValueError):
        return run_dir.relative_to(Path.cwd())
    return run_dir
