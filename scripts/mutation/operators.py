"""The small faults that are put into a module, one at a time.

A mutant is one edit of the module's syntax tree. The kinds:

    comparison   `<` and `<=`, `>` and `>=`, `==` and `!=`, `in`, `is` and their negations change places
    arithmetic   `+` and `-`, `*` and `/`, `**` to `*`, `//` to `/`, `%` to `*`, `<<` and `>>`, `&` and `|`;
                 also in `x += y`
    unary        `-x`, `~x` and `not x` lose their operator
    boolean      `and` and `or` change places
    condition    `if x` becomes `if not x`, where x is no comparison, `and`, `or` or `not`
    constant     n to n + 1, x to x + 1 (to 2x from 1,000 on), True and False, "word" to "XXword"
    return       `return x` gives None
    swap         the first two positional arguments of a call change places
    unwrapped    `f(x)` becomes `x`, for calls of one argument
    opposite     `min` and `max`, `floor` and `ceil`, `all` and `any`, `minimum` and `maximum` change places
    statement    a call, an assignment to an attribute or an item, `x += y`, `raise` or `del` is left out;
                 `continue` and `break` change places

Not mutated: docstrings, type annotations, `__all__`, `__slots__`, imports, decorators, blocks under
`TYPE_CHECKING`, `assert`, all that stands inside a `raise` (its removal is a mutant), what is handed to
loggers, `print` and `warnings.warn`, strings in which a space occurs (prose and SQL) and the literal parts of
f-strings. Plain conversions (`float(x)`, `list(x)`, ...) are not unwrapped; arguments of symmetric functions
(`np.multiply`, ...) are not swapped.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Mutant", "mutants_of"]

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
_OPPOSITES = {
    "min": "max", "max": "min", "floor": "ceil", "ceil": "floor", "all": "any", "any": "all",
    "minimum": "maximum", "maximum": "minimum",
}  # fmt: skip
_CONVERSIONS = {
    "float", "list", "tuple", "dict", "bool", "str", "set", "frozenset", "Path", "len", "range", "next",
    "iter", "type", "super", "repr", "print", "uint32", "uint64", "int64", "float64",
}  # fmt: skip
_SYMMETRIC = {
    "min",
    "max",
    "isinstance",
    "issubclass",
    "hasattr",
    "getattr",
    "setattr",
    "zip",
    "cast",
    "isclose",
    "multiply",
    "add",
    "logaddexp",
}
_PROSE = {"print", "warn", "debug", "info", "warning", "error", "exception", "critical", "log"}
_PLAIN = (ast.Compare, ast.BoolOp, ast.Constant)


@dataclass
class Mutant:
    """One fault. `apply` puts it into the tree that `mutants_of` was given (for good).

    `where`: qualified name of the function, or of the class whose body holds it, "" at the top of the module.
    `cold`: the code runs when the module is imported. `lines`: of the statement. `outermost`: qualified name
    and first line of the function whose code object holds the mutated code.
    """

    module: str
    where: str
    kind: str
    before: str
    after: str
    lines: range
    outermost: tuple[str, int] | None
    apply: Callable[[], None]
    occurrence: int = 0

    @property
    def cold(self) -> bool:
        return self.outermost is None

    @property
    def name(self) -> str:
        """The same as long as the code itself stays: without line numbers."""
        again = f" #{self.occurrence}" if self.occurrence else ""
        return f"{self.module}:{self.where}: {self.kind}: {self.before} -> {self.after}{again}"


@dataclass
class _Place:
    where: str = ""
    outermost: tuple[str, int] | None = None
    lines: range = field(default_factory=lambda: range(0))


def mutants_of(tree: ast.Module, module: str) -> list[Mutant]:
    """All mutants of a parsed module, in the order of its text."""
    seen: Counter[str] = Counter()
    found = []
    for mutant in _Finder(module).statements(tree, _Place()):
        name = mutant.name
        mutant.occurrence = seen[name]
        seen[name] += 1
        found.append(mutant)
    return found


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 110 else f"{text[:107]}..."


def _callee(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _callee(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _Finder:
    def __init__(self, module: str) -> None:
        self.module = module

    def make(self, place: _Place, kind: str, before: str, after: str, apply: Callable[[], None]) -> Mutant:
        return Mutant(self.module, place.where, kind, before, after, place.lines, place.outermost, apply)

    # --- statements

    def statements(self, owner: ast.AST, place: _Place) -> Iterator[Mutant]:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(owner, name, None)
            if isinstance(block, list):
                for index in range(len(block)):
                    if isinstance(block[index], ast.stmt):
                        yield from self.statement(block, index, place)
        for handler in getattr(owner, "handlers", []):
            yield from self.statements(handler, place)
        for case in getattr(owner, "cases", []):
            yield from self.statements(case, place)

    def statement(self, block: list[ast.stmt], index: int, place: _Place) -> Iterator[Mutant]:
        node = block[index]
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal | ast.Pass):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from self.definition(node, place)
            return
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) else node.end_lineno or node.lineno
        place = _Place(place.where, place.outermost, range(node.lineno, max(last, node.lineno) + 1))
        if isinstance(node, ast.If) and _short(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        targets: list[Any] = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id in ("__all__", "__slots__") for t in targets):
            return
        yield from self.removal(block, index, targets, place)
        if isinstance(node, ast.Raise | ast.Delete | ast.Continue | ast.Break):
            return
        if isinstance(node, ast.Return) and node.value is not None and _short(node.value) != "None":
            before = _short(node)

            def give_none(node: ast.Return = node) -> None:
                node.value = ast.Constant(None)

            yield self.make(place, "return", before, "return None", give_none)
        if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
            changed = ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)

            def change(node: ast.AugAssign = node, op: ast.operator = changed.op) -> None:
                node.op = op

            yield self.make(place, "arithmetic", _short(node), _short(changed), change)
        yield from self.fields(node, place)
        yield from self.statements(node, place)

    def definition(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, place: _Place
    ) -> Iterator[Mutant]:
        where = f"{place.where}.{node.name}".lstrip(".")
        if isinstance(node, ast.ClassDef):
            yield from self.statements(node, _Place(where, place.outermost, place.lines))
            return
        outer = _Place(where, place.outermost, range(node.lineno, node.body[0].lineno))
        for values in (node.args.defaults, node.args.kw_defaults):
            for index in range(len(values)):
                if values[index] is not None:
                    yield from self.expression(node, values, index, outer)
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        yield from self.statements(node, _Place(where, place.outermost or (where, first)))

    def removal(
        self, block: list[ast.stmt], index: int, targets: list[Any], place: _Place
    ) -> Iterator[Mutant]:
        node = block[index]
        new: ast.stmt = ast.Pass()
        if isinstance(node, ast.Continue | ast.Break):
            new = ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
        elif isinstance(node, ast.Expr):
            if not isinstance(node.value, ast.Call | ast.Await) or _callee(node.value) in _PROSE - {"warn"}:
                return
        elif isinstance(node, ast.Assign):
            if not all(isinstance(t, ast.Attribute | ast.Subscript) for t in targets):
                return
        elif not isinstance(node, ast.AugAssign | ast.Raise | ast.Delete):
            return
        before = f"raise {_callee(node.exc)}" if isinstance(node, ast.Raise) and node.exc else _short(node)

        def put() -> None:
            block[index] = ast.copy_location(new, node)

        yield self.make(place, "statement", before, _short(new), put)

    # --- expressions

    def fields(self, node: ast.AST, place: _Place) -> Iterator[Mutant]:
        """The expressions right below a node."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "format_spec", "type_params"):
                continue
            if isinstance(value, ast.expr):
                yield from self.expression(node, name, None, place)
            elif isinstance(value, list):
                for index, one in enumerate(value):
                    if isinstance(one, ast.expr):
                        yield from self.expression(node, value, index, place)
                    elif isinstance(one, ast.comprehension | ast.keyword | ast.withitem | ast.match_case):
                        yield from self.fields(one, place)

    def expression(
        self, owner: ast.AST, slot: str | list[Any], index: int | None, place: _Place
    ) -> Iterator[Mutant]:
        node: ast.expr = getattr(owner, slot) if isinstance(slot, str) else slot[index or 0]

        def put(new: ast.expr) -> None:
            new = ast.fix_missing_locations(ast.copy_location(new, node))
            if isinstance(slot, str):
                setattr(owner, slot, new)
            else:
                slot[index or 0] = new

        tested = (isinstance(owner, ast.If | ast.While | ast.IfExp) and slot == "test") or (
            isinstance(owner, ast.comprehension) and slot is owner.ifs
        )
        if tested and not isinstance(node, _PLAIN) and not _is_not(node):
            new = ast.UnaryOp(ast.Not(), node)
            yield self.make(place, "condition", _short(node), _short(new), lambda: put(new))
        yield from self.replacements(owner, node, place, put)
        if isinstance(node, ast.JoinedStr):
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield from self.expression(part, "value", None, place)
            return
        if isinstance(node, ast.Call) and _callee(node) in _PROSE:
            return
        if isinstance(node, ast.Subscript) and _callee(node.value) == "Literal":
            return
        if isinstance(node, ast.Lambda):
            yield from self.expression(node, "body", None, place)
            return
        yield from self.fields(node, place)

    def replacements(
        self, owner: ast.AST, node: ast.expr, place: _Place, put: Callable[[ast.expr], None]
    ) -> Iterator[Mutant]:
        for kind, new in _replacements(owner, node):

            def apply(new: ast.expr = new) -> None:
                put(new)

            yield self.make(place, kind, _short(node), _short(new), apply)


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _replacements(owner: ast.AST, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """What may stand in the place of one expression. Children are shared with `node`, not copied."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            ops = [*node.ops]
            ops[index] = _COMPARISONS[type(operator)]()
            yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield "arithmetic", ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield "unary", node.operand
    elif isinstance(node, ast.BoolOp):
        yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Constant):
        if isinstance(owner, ast.JoinedStr | ast.FormattedValue):
            return
        value = _other(node.value)
        if value is not None:
            yield "constant", ast.Constant(value)
    elif isinstance(node, ast.Call):
        yield from _of_call(owner, node)


def _other(value: object) -> bool | int | float | str | None:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 2 * value if math.isfinite(value) and abs(value) >= 1000 else value + 1
    if isinstance(value, str) and value and not any(c.isspace() for c in value):
        return f"XX{value}"
    return None


def _of_call(owner: ast.AST, node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    name = _callee(node)
    if name in _PROSE:
        return
    if name in _OPPOSITES:
        func: ast.expr = ast.Name(_OPPOSITES[name], ast.Load())
        if isinstance(node.func, ast.Attribute):
            func = ast.Attribute(node.func.value, _OPPOSITES[name], ast.Load())
        yield "opposite", ast.Call(func, node.args, node.keywords)
    plain = not any(isinstance(a, ast.Starred) for a in node.args)
    if plain and len(node.args) >= 2 and name not in _SYMMETRIC | set(_OPPOSITES):
        first, second = node.args[:2]
        if _short(first) != _short(second):
            yield "swap", ast.Call(node.func, [second, first, *node.args[2:]], node.keywords)
    statement = isinstance(owner, ast.Expr)
    if plain and len(node.args) == 1 and not node.keywords and not statement and name not in _CONVERSIONS:
        yield "unwrapped", node.args[0]
