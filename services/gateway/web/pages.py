"""The pages. Each asks the owners as the API does, as the person whose session it is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from libs.common.contracts import messages as m
from libs.common.contracts.message import Message
from libs.common.errors import NotFound, Unauthenticated, Unavailable
from services.gateway.domain.origins import port_suffix
from services.gateway.http.parts import Cursor, Id, Parts, Ref, Wired, Word, cookie_of
from services.gateway.http.status import platform_status
from services.gateway.ports import M
from services.gateway.web.rendering import FOLDER, render

router = APIRouter(include_in_schema=False)

MANY = 500
ROWS = 50
LAST_LINES = 30


class Elsewhere(Exception):
    """The page is at another address."""

    def __init__(self, location: str, sign_out: bool = False) -> None:
        super().__init__(location)
        self.location = location
        self.sign_out = sign_out


@dataclass(frozen=True, slots=True)
class Visitor:
    """A signed-in person in front of a browser."""

    principal: m.Principal
    parts: Parts
    request: Request

    async def ask(self, question: Message, reply: type[M]) -> M:
        return await self.parts.owners.ask(question, reply, self.principal)

    async def ask_or(self, question: Message, reply: type[M]) -> M:
        """An empty answer when the owner has none: a part of a page must not take the rest with it."""
        try:
            return await self.ask(question, reply)
        except (NotFound, Unavailable):
            return reply()

    def page(self, template: str, title: str, *, connect: str = "", **context: Any) -> HTMLResponse:
        return render(template, title=title, connect=connect, visitor=self.principal, **context)

    @property
    def host(self) -> str:
        return self.request.headers.get("host", "")


async def visitor_of(request: Request, parts: Wired) -> Visitor:
    """Who looks at a page: only by the session cookie, only on the interface's own host, only to read."""
    to_interface(request, parts)
    session = request.cookies.get(cookie_of(request), "")
    if not session:
        raise Elsewhere("/sign-in")
    try:
        return Visitor(await parts.authenticator.principal_of(session), parts, request)
    except Unauthenticated:
        raise Elsewhere("/sign-in", sign_out=True) from None


Here = Annotated[Visitor, Depends(visitor_of)]


def to_interface(request: Request, parts: Parts) -> None:
    """Sends a browser that came by another of our names to the interface's own: cookies count only there."""
    host = request.headers.get("host", "")
    origins = parts.settings.origins
    if not origins.is_interface(host):
        raise Elsewhere(str(request.url.replace(netloc=origins.interface_address(host))))


@router.get("/")
async def home(visitor: Here) -> Response:
    return RedirectResponse("/projects", 303)


@router.get("/projects")
async def projects_page(visitor: Here, state: Word = "", cursor: Cursor = "") -> HTMLResponse:
    question = m.ListProjects(state=state, cursor=cursor, limit=ROWS)
    projects, jobs = await asyncio.gather(
        visitor.ask(question, m.ProjectPage), visitor.ask_or(m.ListJobs(limit=MANY), m.JobPage)
    )
    latest: dict[str, m.Job] = {}
    for job in jobs.items:
        latest.setdefault(job.project_id, job)
    return visitor.page("projects.html", "Projects", projects=projects, jobs=jobs, latest=latest, state=state)


@router.get("/projects/{project}")
async def project_page(visitor: Here, project: Ref, cursor: Cursor = "") -> HTMLResponse:
    found = await visitor.ask(m.GetProject(project_id=project), m.Project)
    jobs, models, deployments = await asyncio.gather(
        visitor.ask_or(m.ListJobs(project_id=found.id, cursor=cursor, limit=ROWS), m.JobPage),
        visitor.ask_or(m.ListModels(project_id=found.id, limit=ROWS), m.ModelPage),
        visitor.ask_or(m.ListDeployments(project_id=found.id, limit=ROWS), m.DeploymentPage),
    )
    return visitor.page("project.html", found.name, project=found, jobs=jobs, models=models, deployments=deployments)


@router.get("/runs")
async def runs_page(visitor: Here, state: Word = "", cursor: Cursor = "") -> HTMLResponse:
    jobs, names = await asyncio.gather(
        visitor.ask(m.ListJobs(state=state, cursor=cursor, limit=ROWS), m.JobPage), project_names(visitor)
    )
    return visitor.page("runs.html", "Runs", jobs=jobs, names=names, state=state)


@router.get("/runs/{job_id}")
async def run_page(visitor: Here, job_id: Id) -> HTMLResponse:
    detail = await visitor.ask(m.GetJob(job_id=job_id), m.JobDetail)
    endpoint = visitor.parts.settings.origins.content_address(visitor.host)
    files, run, project, told, nodes = await asyncio.gather(
        visitor.ask_or(m.ListFiles(job_id=job_id, limit=MANY, endpoint=endpoint), m.FilePage),
        visitor.ask_or(m.GetRun(job_id=job_id), m.Run),
        visitor.ask_or(m.GetProject(project_id=detail.job.project_id), m.Project),
        explanation_of(visitor, detail.job),
        visitor.ask_or(m.ListNodes(), m.NodePage),
    )
    hostnames = {node.id: node.hostname for node in nodes.items}
    title = detail.job.template.name or job_id
    return visitor.page(
        "run.html",
        title,
        detail=detail,
        job=detail.job,
        files=files,
        run=run,
        project=project,
        told=told,
        hostnames=hostnames,
    )


async def explanation_of(visitor: Visitor, job: m.Job) -> m.JobExplanation:
    """Of a job that waits; of others the job itself says it."""
    if job.state != "queued":
        return m.JobExplanation()
    return await visitor.ask_or(m.ExplainJob(job_id=job.id), m.JobExplanation)


@router.get("/models")
async def models_page(visitor: Here, cursor: Cursor = "") -> HTMLResponse:
    models, names = await asyncio.gather(
        visitor.ask(m.ListModels(cursor=cursor, limit=ROWS), m.ModelPage), project_names(visitor)
    )
    return visitor.page("models.html", "Models", models=models, names=names)


@router.get("/models/{model}")
async def model_page(visitor: Here, model: Ref) -> HTMLResponse:
    detail = await visitor.ask(m.GetModel(model_id=model), m.ModelDetail)
    return visitor.page("model.html", detail.model.name, model=detail.model, versions=detail.versions)


@router.get("/deployments")
async def deployments_page(visitor: Here, cursor: Cursor = "") -> HTMLResponse:
    deployments, names = await asyncio.gather(
        visitor.ask(m.ListDeployments(cursor=cursor, limit=ROWS), m.DeploymentPage), project_names(visitor)
    )
    return visitor.page("deployments.html", "Deployments", deployments=deployments, names=names)


@router.get("/deployments/{deployment}")
async def deployment_page(visitor: Here, deployment: Ref) -> HTMLResponse:
    found = await visitor.ask(m.GetDeployment(deployment_id=deployment), m.Deployment)
    revision = found.revision
    log_of = revision.replica_job_id or revision.build_job_id
    log = m.LogPage()
    if found.state == "failed" and log_of:
        log = await visitor.ask_or(m.GetLog(job_id=log_of, after=-LAST_LINES, limit=LAST_LINES), m.LogPage)
    programs = visitor.parts.settings.origins.program_address(visitor.host)
    address = f"{visitor.request.url.scheme}://{programs}{found.path}/predict"
    return visitor.page(
        "deployment.html", found.name, deployment=found, revision=revision, log=log, log_of=log_of, address=address
    )


@router.get("/deployments/{deployment}/draw")
async def draw_page(visitor: Here, deployment: Ref) -> HTMLResponse:
    found = await visitor.ask(m.GetDeployment(deployment_id=deployment), m.Deployment)
    origin = f"{visitor.request.url.scheme}://{found.host}{port_suffix(visitor.host)}"
    return visitor.page("draw.html", f"Draw a digit for {found.name}", connect=origin, deployment=found, origin=origin)


@router.get("/nodes")
async def nodes_page(visitor: Here) -> HTMLResponse:
    return visitor.page("nodes.html", "Nodes", nodes=await visitor.ask(m.ListNodes(), m.NodePage))


@router.get("/system")
async def system_page(visitor: Here) -> HTMLResponse:
    status = await platform_status(visitor.parts.owners, visitor.principal)
    return visitor.page("system.html", "System", platform=status)


async def project_names(visitor: Visitor) -> dict[str, str]:
    page = await visitor.ask_or(m.ListProjects(state="any", limit=MANY), m.ProjectPage)
    return {project.id: project.name for project in page.items}


class OwnFiles(StaticFiles):
    """Scripts and styles; browsers ask each time whether they changed, which costs no transfer."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def install(app: FastAPI) -> None:
    app.include_router(router)
    app.mount("/static", OwnFiles(directory=FOLDER / "static"), name="static")
    app.add_exception_handler(Elsewhere, _show_the_way)


async def _show_the_way(request: Request, error: Exception) -> Response:
    assert isinstance(error, Elsewhere)
    response = RedirectResponse(error.location, 303)
    if error.sign_out:
        response.delete_cookie(cookie_of(request))
    return response
