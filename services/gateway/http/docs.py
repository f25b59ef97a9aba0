"""The API described for people and for programs, without a file from elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from libs.common.contracts.asyncapi import asyncapi_document
from libs.common.version import VERSION
from services.gateway.http.parts import API
from services.gateway.web.rendering import render

router = APIRouter(prefix=API, tags=["documents"])
page = APIRouter(prefix="/api")


@cache
def bus_document() -> dict[str, Any]:
    return asyncapi_document(VERSION)


@router.get("/asyncapi.json", summary="The bus, as AsyncAPI 3.0", response_class=JSONResponse)
async def asyncapi() -> Response:
    return JSONResponse(bus_document())


@page.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """All routes of the OpenAPI document, by tag."""
    document: dict[str, Any] = request.app.openapi()
    return render("docs.html", title="API", document=document, groups=grouped(document))


def grouped(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The operations of an OpenAPI document by their first tag."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            entry = {"method": method.upper(), "path": path, **operation}
            groups.setdefault(operation.get("tags", ["other"])[0], []).append(entry)
    return groups
