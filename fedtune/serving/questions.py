"""What a request may ask, and what it is told when it asks something else.

`Limits` bound one request and one client; `read_body` and `read_question` hold a request to them and raise
`Refused`, whose one sentence says what is wrong and what would do; `Rates` counts the texts a second of each
client. None of them keeps, logs or quotes a text.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from fedtune.errors import DataError
from fedtune.runs.predict import Asked, check_texts

__all__ = [
    "Limits",
    "Question",
    "Rates",
    "Refused",
    "characters",
    "check_kind",
    "described",
    "read_body",
    "read_question",
]

_CLIENTS = 10_000  # whose rate is remembered at once


@dataclass(frozen=True)
class Limits:
    """What one request, and one client, may ask.

    Attributes:
        texts: in one request; of a model of pairs: pairs.
        characters: of one text, or of each of a pair.
        body: bytes of one request.
        body_seconds: that a body may take to come.
        bodies: bytes of all requests that are being read or answered.
        connections: that are open at once.
        waiting: tokens in the queue.
        rate: texts a second of one client (a key; without keys an address), on average over some seconds;
            None: any. An explanation counts as many texts as the model is asked about.
        parts: into which an explanation cuts a text, at most.
    """

    texts: int = 256
    characters: int = 20_000
    body: int = 2_000_000
    body_seconds: float = 10.0
    bodies: int = 64_000_000
    connections: int = 1024
    waiting: int = 32_768
    rate: float | None = None
    parts: int = 64


class Question(BaseModel):
    """The body of a request: `text`, or `texts`; of a model of pairs `text` and `text_pair`, or `pairs`; of
    which model; and, of an explanation, which label."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None
    text_pair: str | None = None
    texts: list[str] | None = None
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    model: str | None = None
    label: str | None = None


class Refused(Exception):
    """A request is answered by a status, one sentence and headers."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Rates:
    """Texts a second of each client: a bucket that holds five seconds' worth."""

    def __init__(self, rate: float) -> None:
        self.rate, self.most = rate, max(1.0, 5 * rate)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, count: int, now: float) -> int:
        """0 if `client` may ask `count` texts now; else after how many seconds it may."""
        left, then = self._left.pop(client, (self.most, now))
        left = min(self.most, left + (now - then) * self.rate)
        # More than a bucket holds is let through when it is full, and paid for afterwards.
        short = min(count, self.most) - left
        self._left[client] = (left if short > 0 else left - count, now)
        while len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        return math.ceil(short / self.rate) if short > 0 else 0


async def read_body(request: Request, limits: Limits, hold: Callable[[int], None]) -> bytes:
    """The request's body.

    Args:
        hold: is told of each part how many bytes it has, and may raise `Refused`.

    Raises:
        Refused: it has too many bytes (413), takes too long to come (408), or its client went away (499,
            which nobody but the log reads).
    """
    too_long = Refused(413, f"A request may have {limits.body} bytes. Send fewer texts at a time.")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > limits.body):
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise too_long
                hold(len(part))
    except TimeoutError:
        raise Refused(408, f"The body did not come within {limits.body_seconds:g} s.") from None
    except ClientDisconnect:
        raise Refused(499, "The client went away.") from None
    return bytes(body)


def read_question(body: bytes, limits: Limits, *, explain: bool = False) -> tuple[Question, list[Asked]]:
    """The question in `body`, and its texts, or pairs of them.

    Args:
        explain: it asks for an explanation: of one text, or pair, and it may name a `label`.

    Raises:
        Refused: it is no JSON (400), or no question within `limits` (422).
    """
    try:
        question = Question.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        status = 400 if first["type"] == "json_invalid" else 422
        raise Refused(status, f"{where + ': ' if where else ''}{first['msg']}.") from None
    if explain and question.text is None:
        raise Refused(422, 'Give "text": one text, or one pair, is explained at a time.')
    given = [name for name in ("text", "texts", "pairs") if getattr(question, name) is not None]
    if len(given) != 1:
        raise Refused(422, 'Give "text", or "texts" (of a model of pairs "pairs"): one of the two.')
    if question.text_pair is not None and question.text is None:
        raise Refused(422, 'A "text_pair" is the second text beside "text"; several go into "pairs".')
    if not explain and question.label is not None:
        raise Refused(422, 'A "label" is for /explain; /predict answers with the probability of every label.')
    asked: list[Asked] = [*(question.texts or []), *((one[0], one[1]) for one in question.pairs or [])]
    if question.text is not None:
        asked = [question.text if question.text_pair is None else (question.text, question.text_pair)]
    _check(asked, limits)
    return question, asked


def check_kind(name: str, pairs: bool, asked: Sequence[Asked]) -> None:
    """Raises `Refused` if single texts are asked of a model of `pairs`, or the other way round."""
    if pairs and not isinstance(asked[0], tuple):
        raise Refused(
            422,
            f"The model {name} was trained on pairs of texts, and what it said of one alone would mean "
            'nothing: give "text" and "text_pair", or "pairs": [["first", "second"], ...].',
        )
    if not pairs and isinstance(asked[0], tuple):
        raise Refused(422, f'The model {name} takes single texts: give "text", or "texts".')


def characters(asked: Sequence[Asked]) -> int:
    """Of all texts together."""
    return sum(len(one) if isinstance(one, str) else sum(map(len, one)) for one in asked)


def _check(asked: Sequence[Asked], limits: Limits) -> None:
    pairs = bool(asked) and isinstance(asked[0], tuple)
    what = "pairs" if pairs else "texts"
    if len(asked) > limits.texts:
        raise Refused(422, f"{len(asked)} {what}; a request may have {limits.texts}. Send them in parts.")
    texts = [text for one in asked for text in (one if isinstance(one, tuple) else (one,))]
    for number, text in enumerate(texts, start=1):
        if len(text) > limits.characters:
            raise Refused(
                422,
                f"Text {number} of {len(texts)} has {len(text)} characters, and a text may have "
                f"{limits.characters}. Its beginning will do: the model looks at no more.",
            )
    try:
        check_texts(texts)
    except DataError as error:
        raise Refused(
            422, str(error).replace("Give one or more, or '-' and one text a line.", "Give some.")
        ) from None


def described(
    limits: Limits, models: Mapping[str, Sequence[str]], of_pairs: Collection[str], *, explain: bool
) -> dict[str, Any]:
    """The JSON schema of a question for the OpenAPI page: what `read_question` accepts, and nothing else.

    Args:
        models: the labels of each model that is served.
        of_pairs: which of them take pairs of texts.
    """
    # Python's blanks, of which other readers of a pattern's \s do not know the last five.
    seen = r"[^\s\u001c-\u001f\u0085]"
    text = {"type": "string", "minLength": 1, "maxLength": limits.characters, "pattern": seen}
    pair = {"type": "array", "items": text, "minItems": 2, "maxItems": 2}

    def some(item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "items": item, "minItems": 1, "maxItems": limits.texts}

    def one(names: list[str], asked: dict[str, Any]) -> dict[str, Any]:
        label = {"label": {"type": "string", "enum": sorted(set().union(*(models[name] for name in names)))}}
        return {
            "type": "object",
            "properties": {**asked, "model": {"type": "string", "enum": names}, **(label if explain else {})},
            "required": [*asked, *(["model"] if len(models) > 1 else [])],
            "additionalProperties": False,
        }

    singles = [name for name in models if name not in of_pairs]
    pairs = [name for name in models if name in of_pairs]
    forms = [one(singles, {"text": text})] if singles else []
    forms += [one(pairs, {"text": text, "text_pair": text})] if pairs else []
    if not explain:
        forms += [one(singles, {"texts": some(text)})] if singles else []
        forms += [one(pairs, {"pairs": some(pair)})] if pairs else []
    return forms[0] if len(forms) == 1 else {"oneOf": forms}
