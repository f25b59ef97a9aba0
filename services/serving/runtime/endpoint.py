"""The BentoML service of a deployed model: `POST /predict`, behind a bearer token."""

import hashlib
import hmac
import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
import joblib
from pydantic import AfterValidator, PlainSerializer, ValidationError
from typing_extensions import TypedDict

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "model.json").read_text())
MAX_ROWS = 10_000
# Health, for the platform, and the description of the API; /metrics needs the token like all else.
OPEN_PATHS = ("/", "/livez", "/readyz", "/healthz", "/docs.json", "/schema.json")
REMEDIES = {
    401: ("No valid token", "Send the deployment's endpoint token as `Authorization: Bearer TOKEN`."),
    415: ("Not a media type this endpoint reads", "Send JSON with `Content-Type: application/json`."),
}


class Predictions(TypedDict, total=False):
    predictions: list[Any]
    probabilities: list[list[float]]


def of_model_width(rows: list[list[float]]) -> list[list[float]]:
    """Here and not in the batch, where one wrong row would fail the requests it was batched with."""
    width = FACTS["feature_count"] or (len(rows[0]) if rows else 0)
    if not 0 < len(rows) <= MAX_ROWS:
        raise ValueError(f"between 1 and {MAX_ROWS} rows are needed, {len(rows)} came")
    wrong = next((index for index, row in enumerate(rows) if len(row) != width), None)
    if wrong is not None:
        raise ValueError(f"row {wrong} has {len(rows[wrong])} values; the model takes {width}")
    return rows


def as_columns(rows: list[tuple[Any, list[float] | None]]) -> Predictions:
    answer = Predictions(predictions=[prediction for prediction, _ in rows])
    if FACTS["probabilities"]:
        answer["probabilities"] = [probabilities or [] for _, probabilities in rows]
    return answer


Rows = Annotated[list[list[float]], AfterValidator(of_model_width)]
Answers = Annotated[list[tuple[Any, list[float] | None]], PlainSerializer(as_columns)]


class Guard:
    """Admits holders of the endpoint's token, and only JSON: BentoML's pickle bodies would run code."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._hashes = os.environ.get("NABLA_ENDPOINT_HASHES", "").split()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope) if scope["type"] == "http" else 0
        if refusal:
            await _refuse(send, refusal)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Any) -> int:
        reading = scope["method"] in ("GET", "HEAD")
        if reading and (scope["path"] in OPEN_PATHS or scope["path"].startswith("/static_content/")):
            return 0
        if not self._admits(_values(scope, b"authorization")):
            return 401
        kinds = [value.split(b";")[0].strip().lower() for value in _values(scope, b"content-type")]
        return 0 if reading or kinds in ([], [b"application/json"]) else 415

    def _admits(self, credentials: list[bytes]) -> bool:
        if len(credentials) != 1 or not credentials[0].startswith(b"Bearer "):
            return False
        given = hashlib.sha256(credentials[0][len(b"Bearer ") :].strip()).hexdigest()
        return any([hmac.compare_digest(given, known) for known in self._hashes])  # noqa: C419 - constant time


def _values(scope: Any, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


async def _refuse(send: Any, status: int) -> None:
    title, remedy = REMEDIES[status]
    problem = {"type": "about:blank", "title": title, "status": status, "detail": title + ".", "remedy": remedy}
    headers = [(b"content-type", b"application/problem+json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(problem).encode()})


@bentoml.service(
    name="nabla-endpoint",
    workers=1,
    traffic={"timeout": 60, "max_concurrency": 256},
    logging={"access": {"enabled": False}},
)
class Endpoint:
    def __init__(self) -> None:
        self._model = joblib.load(HERE / FACTS["file"])

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=1000, max_latency_ms=30_000
    )
    def predict(self, inputs: Rows) -> Answers:
        """Predictions for rows of numbers, and their probabilities when the model has them."""
        predictions = self._model.predict(inputs).tolist()
        if not FACTS["probabilities"]:
            return [(prediction, None) for prediction in predictions]
        return list(zip(predictions, self._model.predict_proba(inputs).tolist(), strict=True))


def is_ours(record: logging.LogRecord) -> bool:
    """A traceback for each wrong request would let any caller fill the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], ValidationError))


logging.getLogger("bentoml._internal.server.http_app").addFilter(is_ours)
Endpoint.add_asgi_middleware(Guard)  # type: ignore[attr-defined]
