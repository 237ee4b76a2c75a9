"""The service keeps to its own OpenAPI page, whatever it is asked: fuzzed by schemathesis.

Every answer has a status, a type and a body that the page names; none is a 500; what is valid by the page is
answered, and what is invalid by it is refused.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.errors import Unsatisfiable
from starlette.testclient import TestClient

from fedtune.serving.app import Served, make_app
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.keys import Keys, make_key
from fedtune.serving.questions import Limits

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow


def test_every_answer_is_as_described(exported: Path, tmp_path: Path) -> None:
    bundle, path = Bundle.open(exported), tmp_path / "keys"
    headers = {"Authorization": f"Bearer {make_key(path, 'fuzz')}"}
    model = Served(bundle, Classifier.open(bundle, "onnx", threads=1), "onnx")
    # Few characters, so that texts beyond the limit are among what is tried.
    limits = Limits(texts=4, characters=200)
    about = {**bundle.about, "pairs": True}
    of_pairs = replace(model, bundle=replace(bundle, about=about))
    app = make_app({"film": model, "mood": of_pairs}, limits, keys=Keys.open(path))
    seen: set[str] = set()

    with TestClient(app):  # it opens the queue
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=int(os.environ.get("FEDTUNE_FUZZ", "100")), deadline=None)
                @given(case=operation.as_strategy(generation_mode=mode))
                def ask(case: object) -> None:
                    response = case.call(headers=headers)  # type: ignore[attr-defined]
                    case.validate_response(response)  # type: ignore[attr-defined]
                    seen.add(f"{case.operation.path} {response.status_code}")  # type: ignore[attr-defined]

                with suppress(Unsatisfiable):  # nothing that is wrong can be asked of /healthz
                    ask()
    assert {"/predict 200", "/predict 422", "/explain 200", "/explain 422", "/metrics 200"} <= seen
