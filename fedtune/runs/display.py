"""What a person sees while a federation runs.

On a terminal and in a notebook: one permanent line for each finished round, and a live part with progress,
epsilon so far, time left and what each node is doing. Elsewhere (a pipe, CI, a log): one plain line a round.
Epsilon is never shown without its delta, unit and adjacency. On a terminal everything fits 80 columns.

Implements `fedtune.federation.events.Observer`. It only looks: nothing that a record needs is computed here.
Does not do: the table at the end (`fedtune.runs.summary`), or a page (`fedtune report`).
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedtune.privacy.mechanisms.registry import adds_noise
from fedtune.runs.summary import duration, human_bytes

if TYPE_CHECKING:
    from fedtune.federation.events import RoundSummary

__all__ = ["Display"]

_COUNT_SECONDS = 15.0  # between two lines of how far a long piece of work is
_WAIT_SECONDS = 60.0  # between two lines of what a run waits for
_SHOWN_NODES = 8  # more nodes than this are counted, not listed
_WORDS = {"": "waiting"}
_HEADER = f"{'round':>7} {'accuracy':>9} {'loss':>7} {'epsilon':>8} {'up':>9} {'down':>9} {'time':>13}"


class _NotebookLive:
    """The live part in a notebook: one output, replaced as the run goes on. Rich's own needs ipywidgets."""

    def __init__(self, render: Callable[[], RenderableType]) -> None:
        from IPython.display import HTML, display

        self._render, self._html = render, HTML
        self._handle = display(HTML(""), display_id=True)

    def refresh(self) -> None:
        """Draws it anew."""
        console = Console(record=True, file=io.StringIO(), width=100, force_jupyter=False)
        console.print(self._render())
        page = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        self._handle.update(self._html(page))

    def stop(self) -> None:
        """Takes it away."""
        self._handle.update(self._html(""))


class Display:
    """Shows a run on `console`: live if that is a terminal, else one line a round.

    Args:
        title: the first line.
        unit: the unit of privacy, as epsilon is never shown without it.
        console: where to; None: the standard output.
        brief: only the live part, with the title in it; nothing stays on the screen (for a run of a sweep).
    """

    def __init__(
        self, title: str, *, unit: str = "record", console: Console | None = None, brief: bool = False
    ) -> None:
        self.console = console or Console(highlight=False)
        self._title, self._unit, self._brief = title, unit, brief
        self._live: Live | _NotebookLive | None = None
        # Our own ticker and lock: rich's refresh thread may draw between the moment in which a print decides
        # how many lines to erase and the moment in which it does, and leaves half of the old part behind.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None
        self._spinner = Spinner("dots" if self.console.encoding.startswith("utf") else "line", style="cyan")
        self._doing: str | None = None
        self._status: dict[str, str] = {}
        self._num_rounds = self._done = 0
        self._trust, self._delta = "none", 0.0
        self._epsilon: float | None = None
        self._target: float | None = None
        self._begun = time.monotonic()
        self._last_line = self._begun - _WAIT_SECONDS
        self._seconds: list[float] = []
        self._refusals = 0  # outside of rounds
        self._counted: tuple[str, float, int] | None = None  # what, since when, how many then

    def working(self, what: str) -> None:
        """Shows what goes on outside of the rounds (loading, evaluating)."""
        with self._lock:
            self._doing = what
            self._open()

    def counting(self, what: str, done: int, total: int) -> None:
        """Shows how many of `total` texts are done, for work outside of the rounds that takes minutes.

        Without a terminal one line when it begins and one every 15 s, in a sweep too.
        """
        now = time.monotonic()
        with self._lock:
            if self._counted is None or self._counted[0] != what:
                self._counted, self._last_line = (what, now, done), now - _COUNT_SECONDS
            _, begun, first = self._counted
            self.working(f"{what}: {done:,} of {total:,} texts")
            if self._live is not None or now - self._last_line < _COUNT_SECONDS:
                return
            self._last_line = now
            line = f"{what}: {done:,} of {total:,} texts ({100 * done / max(total, 1):.0f} %)"
            if done > first:
                line += f", about {duration((now - begun) / (done - first) * (total - done))} left"
            self.console.print(Text(line), soft_wrap=True)

    def notes(self, lines: Sequence[str]) -> None:
        """Says for good what was decided about the data and the model; in a sweep nothing."""
        with self._lock:
            self._open()
            if not self._brief:
                for line in lines:
                    self.console.print(Text(f"note: {line}", style="yellow"), soft_wrap=True)

    # --- Observer -------------------------------------------------------------------------------

    def on_start(self, info: Mapping[str, Any]) -> None:
        """The federation begins; `info` as `fedtune.federation.events.Observer` says."""
        with self._lock:
            self._open()
            self._doing = None
            self._begun = time.monotonic()
            self._num_rounds = int(info["num_rounds"])
            self._done = int(info.get("first_round", 1)) - 1
            self._status = dict.fromkeys(info["nodes"], "")
            self._trust, self._target = info["trust"], info.get("epsilon")
            self._delta = info.get("delta") or 0.0
            if self._brief:
                return
            sizes = f"{_count(len(self._status), 'node')}, {_count(self._num_rounds, 'round')}"
            lines = [Text(f"{sizes}; {self._promise()}")]
            if self._done:
                lines.append(Text(f"resumed after round {self._done} of {self._num_rounds}"))
            if self._live is not None:
                lines += [Text(), Text(_HEADER, style="dim")]
            self.console.print(Group(*lines))

    def on_client(self, node: str, status: str) -> None:
        """`asked`, `answered`, `refused: ...` or `dropped: ...`.

        Who refuses or fails outside of a round, which a line of the round would tell, is told for good at
        once.
        """
        with self._lock:
            outside = self._status.get(node) != "asked"
            self._status[node] = status
            if not outside or self._brief or not status.startswith(("refused", "dropped")):
                return
            self._refusals += 1
            if self._refusals <= _SHOWN_NODES:
                self._open()
                self.console.print(Text(f"{node} {status}", style="yellow"), soft_wrap=True)
            elif self._refusals == _SHOWN_NODES + 1:
                self.console.print(Text("more nodes refuse or fail; the record names each", style="yellow"))

    def on_wait(self, reason: str) -> None:
        """Why the run waits, in the live part or as a line at most once a minute; empty: it goes on."""
        with self._lock:
            if self._live is not None:
                self._doing = reason or None
            elif reason and not self._brief and time.monotonic() - self._last_line >= _WAIT_SECONDS:
                self.console.print(Text(reason), soft_wrap=True)
                self._last_line = time.monotonic()

    def on_round(self, summary: RoundSummary) -> None:
        """A round is done."""
        with self._lock:
            self._done = summary.round
            self._epsilon = summary.epsilon if summary.epsilon is not None else self._epsilon
            self._seconds.append(summary.seconds)
            self._status = dict.fromkeys(self._status, "")
            if self._brief:
                return
            if self._live is None:
                self.console.print(Text(self._plain_line(summary)), soft_wrap=True)
                return
            notes = [f"{node}: {reason}" for node, reason in summary.dropped]
            if summary.void:
                notes.append("the round gave no update; the adapter stays as it was")
            lines = [Padding(Text(note, style="yellow"), (0, 0, 0, 8)) for note in notes]
            self.console.print(Group(_round_line(summary), *lines))

    def on_finish(self, result: Any) -> None:
        """The last round is done."""
        self._doing = "finishing"

    def close(self) -> None:
        """Takes the live part away; a second call does nothing."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join(1.0)
            self._ticker = None
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    # --- pieces ---------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._title and not self._brief:
            self.console.print(Text(self._title, style="bold"))
            self._title = ""
        if self._live is not None or self.console.quiet:
            return
        if self.console.is_jupyter:
            self._live = _NotebookLive(self._render)
        elif self.console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self.console, auto_refresh=False, transient=True
            )
            self._live.start()
        else:
            return
        self._closed.clear()
        self._ticker = threading.Thread(target=self._tick, name="fedtune-display", daemon=True)
        self._ticker.start()

    def _tick(self) -> None:
        while not self._closed.wait(0.2):
            with self._lock:
                if self._live is not None:
                    self._live.refresh()

    def _render(self) -> RenderableType:
        if self._brief:
            return Group(Text(self._title, style="bold", no_wrap=True, overflow="ellipsis"), self._progress())
        return self._progress()

    def _progress(self) -> RenderableType:
        if self._doing is not None:
            self._spinner.update(text=f"{self._doing} ...")
            return self._spinner
        total = self._num_rounds
        answered = sum(status not in ("", "asked") for status in self._status.values())
        completed = min(self._done + answered / max(len(self._status), 1), total)
        self._spinner.update(text=Text(f"round {min(self._done + 1, total)} of {total}", style="bold"))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            self._spinner,
            ProgressBar(total=max(total, 1), completed=completed, width=24),
            Text(self._clock(), no_wrap=True),
        )
        return Group(Text(), bar, Text(f"  {self._privacy()}"), *self._nodes())

    def _promise(self) -> str:
        if not adds_noise(self._trust):
            return "no privacy (trust none)"
        return f"trust {self._trust}, delta {self._delta:.1e}, add or remove one {self._unit}"

    def _privacy(self) -> str:
        if not adds_noise(self._trust):
            return "no privacy (trust none): epsilon is infinite"
        so_far = "0.00" if self._epsilon is None else f"{self._epsilon:.2f}"
        goal = "" if self._target is None else f" of {self._target:g}"
        return f"epsilon {so_far}{goal} (delta {self._delta:.1e}, add or remove one {self._unit})"

    def _clock(self) -> str:
        left = self._time_left()
        elapsed = duration(time.monotonic() - self._begun)
        return elapsed if left is None else f"{elapsed}, about {duration(left)} left"

    def _time_left(self) -> float | None:
        if not self._seconds:
            return None
        recent = self._seconds[-5:]
        return sum(recent) / len(recent) * (self._num_rounds - self._done)

    def _nodes(self) -> list[Text]:
        words = {node: _WORDS.get(status, status) for node, status in self._status.items()}
        if len(words) <= _SHOWN_NODES:
            width = max((len(node) for node in words), default=0)
            return [
                Text(f"  {node:<{width}}  {word}", style=_style(word), no_wrap=True, overflow="ellipsis")
                for node, word in words.items()
            ]
        counts: dict[str, int] = {}
        for word in words.values():
            kind = word.split(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
        return [Text("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))]

    def _plain_line(self, summary: RoundSummary) -> str:
        parts = [f"round {summary.round}/{self._num_rounds}:"]
        if summary.accuracy is not None:
            error = (
                "" if summary.accuracy_error is None else f" (standard error {summary.accuracy_error:.3f})"
            )
            parts.append(f"accuracy {summary.accuracy:.3f}{error}")
        if summary.loss is not None:
            parts.append(f"loss {summary.loss:.3f}")
        if summary.epsilon is not None:
            promise = f"(delta {self._delta:.1e}, add or remove one {self._unit})"
            parts.append(f"epsilon {summary.epsilon:.3f} {promise}")
        parts.append(f"up {human_bytes(summary.bytes_up)}, down {human_bytes(summary.bytes_down)}")
        parts.append(duration(summary.seconds))
        left = self._time_left()
        if left:
            parts.append(f"about {duration(left)} left")
        if summary.void:
            parts.append("no update")
        parts += [f"{node}: {reason}" for node, reason in summary.dropped]
        return "  ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def _round_line(summary: RoundSummary) -> Text:
    accuracy, loss, epsilon = (
        "-" if value is None else f"{value:.3f}"
        for value in (summary.accuracy, summary.loss, summary.epsilon)
    )
    if summary.accuracy is not None and summary.accuracy_error is not None:  # never a noised one bare
        accuracy = f"{summary.accuracy:.2f}\u00b1{summary.accuracy_error:.2f}"
    up, down = human_bytes(summary.bytes_up), human_bytes(summary.bytes_down)
    took = duration(summary.seconds)
    return Text(f"{summary.round:>7} {accuracy:>9} {loss:>7} {epsilon:>8} {up:>9} {down:>9} {took:>13}")


def _style(word: str) -> str:
    if word == "asked":
        return "cyan"
    if word == "waiting":
        return "dim"
    return "green" if word == "answered" else "yellow"
