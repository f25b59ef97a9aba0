"""The web application: all routes, behind what every request passes."""

from __future__ import annotations

from fastapi import FastAPI

from libs.common.version import VERSION
from services.gateway.http import (
    accounts,
    deployments,
    docs,
    errors,
    experiments,
    filesets,
    jobs,
    models,
    nodes,
    projects,
    status,
    streams,
)
from services.gateway.http.middleware import BoundedBodies, GuardedResponses, KnownHosts, Traced
from services.gateway.http.parts import API, Parts
from services.gateway.web import pages, sessions

RESOURCES = (accounts, projects, filesets, experiments, jobs, models, deployments, nodes, streams, status, docs)
ROUTERS = (*(resource.router for resource in RESOURCES), status.public, docs.page, sessions.router)
DESCRIPTION = """\
Errors are `application/problem+json` with `detail` (what and why) and `remedy` (what to do). Lists are pages: give
`next_cursor` back as `cursor`. Every POST, PATCH and DELETE takes an `Idempotency-Key`. A project is named by id or
by name.
"""


def application(parts: Parts) -> FastAPI:
    """An ASGI application over these parts."""
    app = FastAPI(
        title="Nabla",
        version=VERSION,
        description=DESCRIPTION,
        openapi_url=f"{API}/openapi.json",
        docs_url=None,
        redoc_url=None,
        # One schema per message: what is sent and what is answered have the same form.
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
        # Our own middleware traces and measures; FastAPI's would do it all a second time.
        telemetry={"tracing": False, "operation_spans": False, "metrics": False, "logs": False},
    )
    app.state.parts = parts
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    pages.install(app)
    # The last one added is met first.
    app.add_middleware(BoundedBodies, settings=parts.settings)
    app.add_middleware(KnownHosts, settings=parts.settings)
    app.add_middleware(Traced)
    app.add_middleware(GuardedResponses)
    return app
