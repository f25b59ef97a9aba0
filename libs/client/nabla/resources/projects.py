"""Projects: what jobs, models and deployments belong to. Each is named by id or by name."""

from __future__ import annotations

from collections.abc import Iterator

from nabla.decoding import decode
from nabla.errors import Conflict
from nabla.objects import Project
from nabla.resources.base import Resource, segment


class Projects(Resource):
    def create(self, name: str, description: str = "") -> Project:
        """Raises Conflict (code "project_exists") when the name is taken."""
        return decode(Project, self._transport.post("/projects", {"name": name, "description": description}))

    def ensure(self, name: str) -> tuple[Project, bool]:
        """The project of that name, and whether it had to be made; safe against others doing the same."""
        try:
            return self.create(name), True
        except Conflict as error:
            if error.code != "project_exists":
                raise
            return self.get(str(error.extra.get("project_id") or name)), False

    def list(self, state: str = "", limit: int | None = None) -> Iterator[Project]:
        """The active ones; `state` may be archived, deleted or any."""
        return self._paged("/projects", Project, {"state": state}, limit)

    def get(self, project: str) -> Project:
        return decode(Project, self._transport.get(f"/projects/{segment(project)}"))

    def update(self, project: str, name: str | None = None, description: str | None = None) -> Project:
        changes = {"name": name, "description": description}
        body = {key: value for key, value in changes.items() if value is not None}
        return decode(Project, self._transport.request("PATCH", f"/projects/{segment(project)}", body=body))

    def archive(self, project: str) -> Project:
        return self._act(project, "archive", {})

    def restore(self, project: str) -> Project:
        """Undoes archive, and delete as long as deleted projects are kept."""
        return self._act(project, "restore", {})

    def move(self, project: str, team_id: str) -> Project:
        return self._act(project, "move", {"team_id": team_id})

    def delete(self, project: str) -> Project:
        return decode(Project, self._transport.request("DELETE", f"/projects/{segment(project)}"))

    def _act(self, project: str, action: str, body: dict[str, str]) -> Project:
        return decode(Project, self._transport.post(f"/projects/{segment(project)}/{action}", body))
