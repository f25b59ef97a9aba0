"""Deployments: a registered model behind an endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Callable

from nabla.decoding import as_json, decode
from nabla.errors import NablaError, WaitTimeout
from nabla.objects import Deployment, Resources
from nabla.resources.base import Resource, segment

POLL_S = 0.5


class Deployments(Resource):
    def create(
        self, name: str, *, project: str, model: str, resources: Resources | None = None, machine_type: str = ""
    ) -> Deployment:
        """`model` is NAME or NAME:VERSION; `machine_type` says what `resources` leave open. Answers at once; `wait`
        tells when it serves."""
        body: dict[str, object] = {"name": name, "project_id": project, "model": model}
        if resources is not None:
            body["resources"] = as_json(resources)
        if machine_type:
            body["machine_type"] = machine_type
        return decode(Deployment, self._transport.post("/deployments", body))

    def list(self, project: str = "", limit: int | None = None) -> Iterator[Deployment]:
        return self._paged("/deployments", Deployment, {"project_id": project}, limit)

    def get(self, deployment: str) -> Deployment:
        return decode(Deployment, self._transport.get(f"/deployments/{segment(deployment)}"))

    def delete(self, deployment: str) -> Deployment:
        return decode(Deployment, self._transport.request("DELETE", f"/deployments/{segment(deployment)}"))

    def wait(
        self,
        deployment: str,
        timeout_s: float = 600.0,
        on_change: Callable[[Deployment], None] = lambda deployment: None,
    ) -> Deployment:
        """Until it serves or has failed, whichever comes; `on_change` is called with each new state."""
        deadline, told = time.monotonic() + timeout_s, ""
        while True:
            now = self.get(deployment)
            if f"{now.state} {now.detail}" != told:
                told = f"{now.state} {now.detail}"
                on_change(now)
            if now.state in ("ready", "failed", "deleted"):
                return now
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"The deployment {now.name!r} is still {now.state} after {timeout_s:.0f} s: {now.detail}",
                    f"It goes on; look again with `nabla deployments get {now.name}`.",
                )
            self._transport.sleep(POLL_S)

    def predict(self, deployment: str, inputs: object) -> dict[str, object]:
        """Sends a batch to the endpoint: `inputs` is a list of rows, or the whole request body as a dict."""
        found = self.get(deployment)
        if found.state != "ready":
            raise NablaError(
                f"The deployment {found.name!r} is {found.state}: {found.detail or 'it does not serve yet'}",
                f"See `nabla deployments get {found.name}`.",
            )
        body = inputs if isinstance(inputs, dict) else {"inputs": inputs}
        answer = self._transport.front_door_post(f"{found.path}/predict", found.endpoint_token, body)
        if not isinstance(answer, dict):
            raise NablaError(f"The endpoint of {found.name!r} did not answer with a JSON object.")
        return answer
