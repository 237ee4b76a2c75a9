"""What a request may ask, and what it is told when it asks something else.

`Limits` bound one request and one client; `read_body` and `read_question` hold a request to them and raise
`Refused`, whose one sentence says what is wrong and what would do; `Rates` counts the texts a second of each
client. None of them keeps, logs or quotes a text.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from fedtune.errors import DataError
from fedtune.runs.predict import check_texts

__all__ = ["Limits", "Question", "Rates", "Refused", "described", "read_body", "read_question"]

_CLIENTS = 10_000  # whose rate is remembered at once


@dataclass(frozen=True)
class Limits:
    """What one request, and one client, may ask.

    Attributes:
        texts: in one request.
        characters: of one text.
        body: bytes of one request.
        body_seconds: that a body may take to come.
        waiting: tokens in the queue.
        rate: texts a second of one client (a key; without keys an address), on average over some seconds;
            None: any. An explanation counts as many texts as the model is asked about.
        parts: into which an explanation cuts a text, at most.
    """

    texts: int = 256
    characters: int = 20_000
    body: int = 2_000_000
    body_seconds: float = 10.0
    waiting: int = 32_768
    rate: float | None = None
    parts: int = 64


class Question(BaseModel):
    """The body of a request: `text`, or `texts`; of which model; and, of an explanation, which label."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None
    texts: list[str] | None = None
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


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body.

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
    except TimeoutError:
        raise Refused(408, f"The body did not come within {limits.body_seconds:g} s.") from None
    except ClientDisconnect:
        raise Refused(499, "The client went away.") from None
    return bytes(body)


def read_question(body: bytes, limits: Limits, *, explain: bool = False) -> tuple[Question, list[str]]:
    """The question in `body`, and its texts.

    Args:
        explain: it asks for an explanation: `text` alone, and it may name a `label`.

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
        raise Refused(422, 'Give "text": one text is explained at a time.')
    if (question.text is None) == (question.texts is None):
        raise Refused(422, 'Give "text", or "texts": one of the two.')
    if not explain and question.label is not None:
        raise Refused(422, 'A "label" is for /explain; /predict answers with the probability of every label.')
    texts = [question.text] if question.text is not None else question.texts or []
    _check(texts, limits)
    return question, texts


def _check(texts: Sequence[str], limits: Limits) -> None:
    if len(texts) > limits.texts:
        raise Refused(422, f"{len(texts)} texts; a request may have {limits.texts}. Send them in parts.")
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


def described(limits: Limits, models: Mapping[str, Sequence[str]], *, explain: bool) -> dict[str, Any]:
    """The JSON schema of a question for the OpenAPI page: what `read_question` accepts, and nothing else.

    Args:
        models: the labels of each model that is served.
    """
    # Python's blanks, of which other readers of a pattern's \s do not know the last five.
    seen = r"[^\s\u001c-\u001f\u0085]"
    text = {"type": "string", "minLength": 1, "maxLength": limits.characters, "pattern": seen}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": limits.texts}
    model = {"model": {"type": "string", "enum": list(models)}}
    label = {"label": {"type": "string", "enum": sorted(set().union(*models.values()))}}

    def one(name: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
        required = [name] if len(models) == 1 else [name, "model"]
        return {
            "type": "object",
            "properties": {name: value, **model, **more},
            "required": required,
            "additionalProperties": False,
        }

    if explain:
        return one("text", text, **label)
    return {"oneOf": [one("text", text), one("texts", texts)]}
