"""Which tests reach which lines, and which mutants they kill: a plugin that takes the place of pytest's loop.

A mutant of a function is put in by changing the function's code object in a forked child: everybody who has
imported the function has the mutant then, and nothing is imported anew. Only the tests that execute the
mutated statement run, first those that have killed most. A mutant of code that runs at import goes to
`scripts.mutation.cold`.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from scripts.mutation.children import Child, Outcome, in_children
from scripts.mutation.cold import ColdServer, import_libraries
from scripts.mutation.operators import Mutant, mutants_of

__all__ = ["MutationRun", "Options", "Source"]

_LONGEST = 15.0  # seconds: tests that take longer under the tracer are left out
# Whose tests are a module's own, where the file is not called as the module.
_OWN = {"checks": "plan", "facts": "statement", "picture": "strength_picture", "releases": "state"}


@dataclass
class Source:
    """One module under test. `name` is the importable one, `verdicts` by the mutants' names."""

    name: str
    path: Path
    verdicts: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def mutants(self) -> tuple[ast.Module, list[Mutant]]:
        """A fresh tree and its mutants."""
        tree = ast.parse(self.text)
        return tree, mutants_of(tree, self.name)


@dataclass
class Options:
    """How to run.

    Attributes:
        jobs: mutants at a time.
        again: decide all of them anew.
        alive: decide those anew that have survived.
        only: part of the names of those that are run.
        enough: seconds of tests that a mutant must survive at most.
        tests: files and folders.
        left_out: what pytest's `-k` keeps.
    """

    jobs: int
    again: bool
    alive: bool
    only: str
    enough: float
    tests: list[str]
    left_out: str


class MutationRun:
    """Takes pytest's place after collection.

    Runs the mutants of `sources`; what tests reach is measured for `every` module. `state`: folder in which
    results are kept between runs.
    """

    def __init__(self, sources: list[Source], every: list[Source], state: Path, options: Options) -> None:
        self.sources, self.every, self.state, self.options = sources, every, state, options
        self.cores = len(os.sched_getaffinity(0))
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[str, frozenset[int]]] = {}
        self.unfit: dict[str, str] = {}
        self.kills: Counter[tuple[str, str]] = Counter()
        self.hints: dict[str, str] = {}  # what killed a mutant in an earlier run, of other code perhaps
        self.cold = ColdServer()
        state.mkdir(parents=True, exist_ok=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measures what the tests reach, then runs the mutants of each module."""
        self.items = {item.nodeid: item for item in session.items}
        import_libraries()
        self._reach(session.items)
        functions = self._functions()
        gc.collect()
        gc.freeze()
        for source in self.sources:
            self._test(source, functions)
        self.cold.close()
        return True

    @property
    def described(self) -> dict[str, Any]:
        """Which tests there were."""
        slow = sum(why == "slow" for why in self.unfit.values())
        skipped = sum(why == "skipped" for why in self.unfit.values())
        return {
            "folders": self.options.tests,
            "collected": len(self.items),
            "used": len(self.seconds),
            "left_out": (
                f"tests of speed (-k {self.options.left_out!r}); {slow} of over "
                f"{_LONGEST:.0f} s, {skipped} skipped; at most {self.options.enough:g} s of tests a mutant, "
                "its own module's first"
            ),
            "failing_without_a_mutant": sorted(
                name for name, why in self.unfit.items() if why not in ("slow", "skipped")
            ),
        }

    def reaches(self, mutant: Mutant) -> bool:
        """Whether any test executes the mutated statement."""
        return bool(self._chosen(mutant))

    # --- coverage

    def _reach(self, items: list[pytest.Item]) -> None:
        """Runs each test alone, traced, in a child: what it reaches, and whether it passes at all."""
        files = {str(source.path): source for source in self.every}
        modules = {source.name: source.digest for source in self.every}
        stored = self.state / "reach.json"
        known: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        digests = {str(i.path): hashlib.sha256(i.path.read_bytes()).hexdigest()[:16] for i in items}

        def is_known(item: pytest.Item) -> bool:
            """Whether neither the test nor any module that it reached has changed."""
            one = known.get(item.nodeid)
            if one is None or one["file"] != digests[str(item.path)]:
                return False
            return all(one["modules"].get(module) == modules.get(module) for module in one["lines"])

        wanted = [item for item in items if not is_known(item)]
        count = 0

        def done(child: Child, outcome: Outcome) -> None:
            nonlocal count
            count += 1
            name = child.key
            lines = outcome.lines.get(name, {})
            known[name] = {
                "file": digests[str(self.items[name].path)],
                "failed": outcome.failed or outcome.error or ("" if outcome.passed else "skipped"),
                "seconds": outcome.seconds.get(name, 99.0),
                "lines": {files[f].name: n for f, n in lines.items() if n},
                "modules": modules,
            }
            if count % 50 == 0:
                _say(f"  reached by tests: {count} of {len(wanted)}")
                stored.write_text(json.dumps(known))

        trace = frozenset(files)
        in_children(
            (Child(i.nodeid, [i], lambda: None, trace=trace) for i in wanted), self.options.jobs, done
        )
        stored.write_text(json.dumps(known))
        for name in self.items:
            one = known[name]
            slow = one["seconds"] > _LONGEST
            if one["failed"] or slow:
                self.unfit[name] = one["failed"] or "slow"
                continue
            self.seconds[name] = one["seconds"]
            self.lines[name] = {module: frozenset(numbers) for module, numbers in one["lines"].items()}
        failed = {n: why for n, why in self.unfit.items() if why not in ("slow", "skipped")}
        _say(f"{len(self.seconds)} tests; left out: {len(self.unfit)}, {len(failed)} fail without a mutant")
        for name in failed:
            _say(f"  fails: {name}")

    def _functions(self) -> dict[tuple[str, str, int], list[FunctionType]]:
        """The function objects of the modules, by file, qualified name and first line."""
        files = {str(source.path) for source in self.sources}
        found: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename in files:
                code = one.__code__
                found[code.co_filename, one.__qualname__, code.co_firstlineno].append(one)
        return found

    # --- mutants

    def _chosen(self, mutant: Mutant) -> list[str]:
        """The tests that execute the mutated statement, most promising first."""
        module = mutant.module
        reached = [n for n, lines in self.lines.items() if module in lines and (
            mutant.cold or not lines[module].isdisjoint(mutant.lines))]  # fmt: skip
        short = module.rpartition(".")[2]
        own, where = f"/test_{_OWN.get(short, short)}", f"{module}:{mutant.where}"
        reached.sort(key=lambda n: (-self.kills[where, n], own not in n, self.seconds[n]))
        chosen, seconds = [], 0.0
        for name in reached:
            seconds += self.seconds[name]
            if seconds > self.options.enough:
                break
            chosen.append(name)
        killer = self.hints.get(mutant.name, "")
        if killer in reached:
            chosen = [killer, *(name for name in chosen if name != killer)]
        return chosen

    def _test(self, source: Source, functions: dict[tuple[str, str, int], list[FunctionType]]) -> None:
        tree, mutants = source.mutants()
        mutants = [m for m in mutants if self.options.only in m.name]
        stored = self.state / f"{source.name}-{source.digest}.json"
        for path in sorted(self.state.glob(f"{source.name}-*.json"), key=lambda p: p.stat().st_mtime):
            self.hints |= {name: killer for name, killer in json.loads(path.read_text()).items() if killer}
        if stored.exists():
            source.verdicts = json.loads(stored.read_text())
        known = {} if self.options.again else source.verdicts
        wanted = [m for m in mutants if m.name not in known or (self.options.alive and not known[m.name])]
        _say(f"{source.name}: {len(mutants)} mutants, {len(wanted)} to run")
        started, count, slow = time.monotonic(), 0, []

        def verdict(mutant: Mutant, failed: str) -> None:
            nonlocal count
            count += 1
            source.verdicts[mutant.name] = failed
            if failed and not failed.startswith("("):
                self.kills[f"{mutant.module}:{mutant.where}", failed] += 1
            if not failed:
                _say(f"  survived, line {mutant.lines.start}: {mutant.where}: {mutant.kind}: "
                     f"{mutant.before} -> {mutant.after}")  # fmt: skip
            if count % 100 == 0 or count == len(wanted):
                alive = sum(source.verdicts.get(m.name) == "" for m in wanted)
                _say(f"  {count} of {len(wanted)}, {alive} alive, {time.monotonic() - started:.0f} s")
            if count % 20 == 0:
                stored.write_text(json.dumps(source.verdicts))

        def children() -> Iterator[Child]:
            for mutant in wanted:
                names = self._chosen(mutant)
                if mutant.cold:
                    slow.append(mutant)
                elif not names:
                    verdict(mutant, "")
                else:
                    put = self._putter(source, tree, mutant, functions)
                    items = [self.items[n] for n in names]
                    yield Child(mutant, items, put, self.seconds)

        def done(child: Child, outcome: Outcome) -> None:
            if outcome.error:
                _say(f"  to the cold ones: {child.key.name}: {outcome.error}")
                slow.append(child.key)
            else:
                verdict(child.key, outcome.failed)

        in_children(children(), self.options.jobs, done)
        for mutant in slow:
            tests = self._chosen(mutant)
            request = {
                "path": str(source.path), "module": source.name, "mutant": mutant.name,
                "tests": tests,
                "seconds": 60.0 + 10.0 * sum(self.seconds[n] for n in tests),
            }  # fmt: skip
            verdict(mutant, self.cold.ask(request) if tests else "")
        stored.write_text(json.dumps(source.verdicts))

    def _putter(
        self,
        source: Source,
        tree: ast.Module,
        mutant: Mutant,
        functions: dict[tuple[str, str, int], list[FunctionType]],
    ) -> Callable[[], None]:
        def put() -> None:
            assert mutant.outermost is not None
            name, line = mutant.outermost
            mutant.apply()
            code = compile(ast.fix_missing_locations(tree), str(source.path), "exec")
            new = _find(code, name, line)
            targets = functions[str(source.path), name, line]
            if not targets:
                raise LookupError(f"no function object of {name}")
            for function in targets:
                function.__code__ = new

        return put


def _find(code: CodeType, name: str, line: int) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name and constant.co_firstlineno == line:
                return constant
            if name.startswith(f"{constant.co_qualname}."):
                try:
                    return _find(constant, name, line)
                except LookupError:
                    pass
    raise LookupError(f"no code of {name}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
