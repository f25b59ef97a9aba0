"""Whatever people, jobs and files are called, and whatever they say: it stays text on every page."""

from __future__ import annotations

from datetime import UTC, datetime
from html.parser import HTMLParser
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import httpx
import pytest
from jinja2 import Environment
from pydantic import BaseModel

from libs.common.contracts import messages as m
from libs.common.errors import NotFound
from services.gateway.http.docs import grouped
from services.gateway.http.parts import SESSION
from services.gateway.web import rendering
from tests.unit.gateway.fakes import MEMBER_TOKEN, World

pytestmark = pytest.mark.unit

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</pre></title></textarea><iframe src=//evil.example>",
    "&lt;script&gt;{{ 7 * 7 }}{% raw %}<b>",
    "\x1b[31mred\x1b]0;title\x07<u>",
)
PAGES = {
    "projects.html": "/projects",
    "project.html": "/projects/pr1",
    "runs.html": "/runs",
    "run.html": "/runs/js1",
    "models.html": "/models",
    "model.html": "/models/mo1",
    "deployments.html": "/deployments",
    "deployment.html": "/deployments/de1",
    "draw.html": "/deployments/de1/draw",
    "nodes.html": "/nodes",
    "system.html": "/system",
    "problem.html": "/projects/pr2",
    "sign_in.html": "/sign-in",
    "docs.html": "",
}
# Extended or imported by the others.
WITHIN = {"base.html", "parts.html"}
STATES = ("failed", "ready", "odd")
ANSWERS = {
    m.ListProjects: m.ProjectPage,
    m.GetProject: m.Project,
    m.ListJobs: m.JobPage,
    m.GetJob: m.JobDetail,
    m.ListFiles: m.FilePage,
    m.GetRun: m.Run,
    m.ListModels: m.ModelPage,
    m.GetModel: m.ModelDetail,
    m.ListDeployments: m.DeploymentPage,
    m.GetDeployment: m.Deployment,
    m.GetLog: m.LogPage,
    m.GetService: m.ServiceStatus,
    m.ListNodes: m.NodePage,
    m.ExplainJob: m.JobExplanation,
}


def filled(kind: Any, text: str, state: str) -> Any:
    """A value of this type with `text` wherever a text may stand, also as names in maps."""
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return filled(arguments[0], text, state)
    if origin in (Union, UnionType):
        return filled(next(each for each in arguments if each is not NoneType), text, state)
    if origin is tuple:
        return (filled(arguments[0], text, state), filled(arguments[0], text, state))
    if origin is dict:
        return {text: filled(arguments[1], text, state)}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_construct(
            **{
                name: state if name == "state" else filled(field.annotation, text, state)
                for name, field in kind.model_fields.items()
            }
        )
    return {str: text, int: 2, float: 2.0, bool: True, datetime: datetime(2030, 1, 1, tzinfo=UTC), bytes: b""}[kind]


class Structure(HTMLParser):
    """The elements of a page with the names of their attributes, and where its links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "formaction")]

    def handle_data(self, data: str) -> None:
        self.text += data


async def page(client: httpx.AsyncClient, world: World, template: str, text: str, state: str) -> str:
    """The page that this template makes of answers full of `text`."""

    def missing(_: m.GetProject) -> m.Project:
        raise NotFound("project_not_found", text, text)

    if template == "docs.html":
        return hostile_document(world, text)
    for question, reply in ANSWERS.items():
        world.owners.answers[question] = lambda _, reply=reply: filled(reply, text, state)
    if template == "problem.html":
        world.owners.answers[m.GetProject] = missing
    client.cookies.set(f"{SESSION}_8080", MEMBER_TOKEN)
    headers = {"Accept": "text/html", "Host": "localhost:8080"}
    answer = await client.get(PAGES[template], headers=headers)
    assert answer.status_code == (404 if template == "problem.html" else 200), answer.text
    return answer.text


def hostile_document(world: World, text: str) -> str:
    document = world.app.openapi()
    first = {"tags": [text], "summary": text, "parameters": [{"in": "query", "name": text}]}
    schema = {"properties": {text: {"type": text, "description": text}}, "required": [text]}
    altered = document | {
        "info": {"description": text},
        "paths": {f"/{text}": {"get": first}},
        "components": {"schemas": {text: schema}},
    }
    body = rendering.render("docs.html", title=text, document=altered, groups=grouped(altered)).body
    return bytes(body).decode()


def test_every_template_has_a_case() -> None:
    files = {path.name for path in (rendering.FOLDER / "templates").iterdir()}
    assert files == PAGES.keys() | WITHIN


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("template", PAGES)
async def test_hostile_words_change_nothing_but_the_text(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch, template: str, state: str
) -> None:
    used: list[str] = []
    get = Environment.get_template

    def noting(self: Environment, name: Any, *rest: Any, **more: Any) -> Any:
        used.append(name)
        return get(self, name, *rest, **more)

    monkeypatch.setattr(Environment, "get_template", noting)
    plain = Structure(await page(client, world, template, "plain", state))
    assert used[0] == template
    for text in HOSTILE:
        body = await page(client, world, template, text, state)
        found = Structure(body)
        assert found.elements == plain.elements, text
        assert not [link for link in found.links if link.strip().lower().startswith("javascript")]
        assert template == "sign_in.html" or text.strip()[:12] in found.text, "the page does not show it at all"


def test_scripts_of_ours_put_no_text_into_pages_as_markup() -> None:
    for path in (rendering.FOLDER / "static").glob("*.js"):
        code = path.read_text().replace("newer.innerHTML !== part.innerHTML", "")
        for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert danger not in code, path.name
