"""Secrets: written and never read. A job names one as `secret:NAME`, in the place of a variable's value."""

from __future__ import annotations

from collections.abc import Iterator

from nabla.decoding import decode
from nabla.objects import Secret
from nabla.resources.base import Resource, segment


class Secrets(Resource):
    """Of the team, or of a project when one is named: a project's own goes before the team's of the same name."""

    def set(self, name: str, value: str, project: str = "") -> Secret:
        """Makes it, or gives it its next value; the value that it has already changes nothing."""
        body = {"value": value, "project_id": project}
        return decode(Secret, self._transport.request("PUT", f"/secrets/{segment(name)}", body=body))

    def list(self, project: str = "", limit: int | None = None) -> Iterator[Secret]:
        """The team's, and the project's when one is named; newest first."""
        return self._paged("/secrets", Secret, {"project_id": project}, limit)

    def delete(self, name: str, project: str = "") -> Secret:
        """Jobs that have started keep the value; those that start later and name it are refused."""
        answer = self._transport.request("DELETE", f"/secrets/{segment(name)}", params={"project_id": project})
        return decode(Secret, answer)
