"""Errors on the wire: RFC 9457 problem documents, the same between services and at the REST API."""

from __future__ import annotations

from pydantic import BaseModel

from libs.common.errors import REFUSALS, IllegalTransition, MalformedMessage, Refusal, Unavailable


class Problem(BaseModel):
    """What happened, why, and what to do."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    remedy: str = ""
    facts: dict[str, str | int | float] = {}


def problem_of(error: Exception) -> Problem:
    """The problem to answer with; errors that are not for people become a plain 500 without their content."""
    match error:
        case Refusal():
            return Problem(
                title=error.title,
                status=error.status,
                code=error.code,
                detail=error.detail,
                remedy=error.remedy,
                facts=error.facts,
            )
        case MalformedMessage():
            remedy = "See /api/docs for the fields."
            return Problem(title="Not valid", status=422, code="malformed", detail=str(error), remedy=remedy)
        case IllegalTransition():
            return Problem(
                title="In conflict with the present state", status=409, code="wrong_state", detail=str(error)
            )
        case _:
            return Problem(
                title="Internal error",
                status=500,
                code="internal",
                detail="The platform failed to handle this; the service's log has the reason under the trace id.",
                remedy="Try again; if it stays, look at `nabla doctor`.",
            )


def refusal_from(problem: Problem) -> Refusal:
    """The error that a problem stands for, to be raised at the asking side."""
    kind = REFUSALS.get(problem.status, Unavailable if problem.status >= 500 else Refusal)
    return kind(problem.code, problem.detail, problem.remedy, **problem.facts)
