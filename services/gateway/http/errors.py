"""Every error as RFC 9457 `application/problem+json`, never with anything of our insides in it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from opentelemetry import trace
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from libs.common.contracts.problem import Problem, problem_of
from libs.common.errors import NablaError, Unavailable
from services.gateway.ports import Closing
from services.gateway.web.rendering import render

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = "1"
MAX_FIELDS = 20


class ProblemBody(BaseModel):
    """What went wrong, why, and what to do. Some problems have further members, such as `project_id`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:nabla:problem:project_not_found"])
    title: str
    status: int
    detail: str = Field(description="What happened and why.")
    remedy: str = Field(description="What to do next.")
    code: str = Field(description="Short and stable, for programs.")
    trace_id: str = Field(default="", description="Under which the services' logs speak of it.")


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ProblemBody, "description": "A problem with what to do about it."},
    "5XX": {"model": ProblemBody, "description": "A problem of the platform; 503 is worth repeating."},
}


def install(app: FastAPI) -> None:
    app.add_exception_handler(NablaError, _refused)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Closing, _closing)


def problem_response(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    body = problem.model_dump(exclude={"facts"})
    kind = f"urn:nabla:problem:{problem.code}" if problem.type == "about:blank" else problem.type
    content = problem.facts | body | {"type": kind, "trace_id": trace_id()}
    return JSONResponse(content, problem.status, _headers(problem.status) | (headers or {}), MEDIA_TYPE)


def trace_id() -> str:
    """The active trace, or an empty string."""
    active = trace.get_current_span().get_span_context()
    return format(active.trace_id, "032x") if active.is_valid else ""


def _headers(status: int) -> dict[str, str]:
    match status:
        case 401:
            return {"WWW-Authenticate": "Bearer"}
        case 503:
            return {"Retry-After": RETRY_AFTER_S}
    return {}


async def _refused(request: Request, error: Exception) -> Response:
    return _answer(request, problem_of(error))


async def _closing(request: Request, _error: Exception) -> Response:
    return _answer(request, problem_of(Unavailable("stopping", "The gateway is stopping.", "Try again.")))


def _answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """A page for a person who looks at pages, else the document."""
    if request.url.path.startswith("/api") or "text/html" not in request.headers.get("accept", ""):
        return problem_response(problem, headers)
    return render("problem.html", status=problem.status, title=problem.title, problem=problem, trace_id=trace_id())


async def _not_valid(request: Request, error: Exception) -> Response:
    """FastAPI's own validation; the given values stay out of it, they may be secret."""
    assert isinstance(error, RequestValidationError)
    found = [(_place(item["loc"]), str(item["msg"])) for item in error.errors()][:MAX_FIELDS]
    detail = "; ".join(f"{place}: {said}" for place, said in found)
    remedy = "Correct these fields; /api/docs lists what each route takes."
    problem = Problem(title="Not valid", status=422, code="invalid_request", detail=detail, remedy=remedy)
    return _answer(request, problem)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "body")[:200] or "body"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    title = HTTPStatus(status).phrase
    detail, remedy = _words(request, status)
    problem = Problem(title=title, status=status, code=title.lower().replace(" ", "_"), detail=detail, remedy=remedy)
    return _answer(request, problem, dict(error.headers or {}))


def _words(request: Request, status: int) -> tuple[str, str]:
    path = request.url.path[:200]
    match status:
        case 404:
            return f"There is no {path} here.", "/api/docs lists all routes."
        case 405:
            return f"{path} does not take {request.method}.", "/api/docs lists all routes and their methods."
        case _:
            return HTTPStatus(status).description or HTTPStatus(status).phrase, ""
