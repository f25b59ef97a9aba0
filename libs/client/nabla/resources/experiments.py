"""Experiments: a named template plus its jobs."""

from __future__ import annotations

from collections.abc import Iterator

from nabla.decoding import as_json, decode
from nabla.objects import Experiment, JobTemplate
from nabla.resources.base import Resource, segment


class Experiments(Resource):
    def start(self, project: str, name: str, template: JobTemplate) -> Experiment:
        """Makes the experiment and its one job in one step."""
        body = {"project_id": project, "name": name, "kind": "single", "template": as_json(template)}
        return decode(Experiment, self._transport.post("/experiments", body))

    def list(self, project: str = "", limit: int | None = None) -> Iterator[Experiment]:
        return self._paged("/experiments", Experiment, {"project_id": project}, limit)

    def get(self, experiment_id: str) -> Experiment:
        return decode(Experiment, self._transport.get(f"/experiments/{segment(experiment_id)}"))
