"""The client: one object through which everything the platform offers is reached.

with nabla.Client() as client:
    for job in client.jobs.list(limit=10):
        print(job.id, job.state)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Callable

from nabla import contexts
from nabla.address import front_door
from nabla.contexts import Context
from nabla.decoding import decode
from nabla.errors import NoServer
from nabla.objects import MachinePage, MachineType, Principal, SignInLink, Status
from nabla.transport import PATIENCE_S, OnRetry, Transport

if TYPE_CHECKING:
    from nabla.resources.deployments import Deployments
    from nabla.resources.experiments import Experiments
    from nabla.resources.filesets import Filesets
    from nabla.resources.jobs import Jobs
    from nabla.resources.models import Models
    from nabla.resources.nodes import Nodes
    from nabla.resources.projects import Projects
    from nabla.resources.tokens import Tokens


class Client:
    """Talks to one server as one principal.

    Without arguments it finds its server as the command line does (see nabla.contexts); `context` names a saved
    one; `url` and `token` say both outright, with `ca` as a file of certificates to trust. With `traceparent` (W3C)
    all of its requests belong to one trace. Not meant to be shared between threads while it is being closed,
    otherwise safe to share. `sleep` is a seam for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        context: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        on_retry: OnRetry | None = None,
        traceparent: str = "",
        ca: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.context = _context(url, token, context, ca)
        self._transport = Transport(
            self.context.url,
            self.context.token,
            patience_s=patience_s,
            on_retry=on_retry,
            traceparent=traceparent,
            ca=self.context.ca,
            sleep=sleep,
        )

    # Each kind of object is loaded when it is first used: a command mostly needs one.

    @cached_property
    def projects(self) -> Projects:
        from nabla.resources.projects import Projects

        return Projects(self._transport)

    @cached_property
    def filesets(self) -> Filesets:
        from nabla.resources.filesets import Filesets

        return Filesets(self._transport)

    @cached_property
    def experiments(self) -> Experiments:
        from nabla.resources.experiments import Experiments

        return Experiments(self._transport)

    @cached_property
    def jobs(self) -> Jobs:
        from nabla.resources.jobs import Jobs

        return Jobs(self._transport, lambda: self.filesets, self.experiments)

    @cached_property
    def models(self) -> Models:
        from nabla.resources.models import Models

        return Models(self._transport, self.filesets)

    @cached_property
    def deployments(self) -> Deployments:
        from nabla.resources.deployments import Deployments

        return Deployments(self._transport)

    @cached_property
    def nodes(self) -> Nodes:
        from nabla.resources.nodes import Nodes

        return Nodes(self._transport)

    @cached_property
    def tokens(self) -> Tokens:
        from nabla.resources.tokens import Tokens

        return Tokens(self._transport)

    def predict(self, deployment: str, inputs: object) -> dict[str, object]:
        """Asks a deployed model: rows in, `{"predictions": [...]}` out."""
        return self.deployments.predict(deployment, inputs)

    def whoami(self) -> Principal:
        return decode(Principal, self._transport.get("/whoami"))

    def status(self) -> Status:
        return decode(Status, self._transport.get("/status"))

    def machines(self) -> Sequence[MachineType]:
        """The machine types, and how many jobs of each could start now."""
        return decode(MachinePage, self._transport.get("/machines")).items

    def server_time(self) -> float | None:
        """The server's clock, in seconds since the epoch; needs no valid token."""
        return self._transport.server_time()

    def installation_id(self) -> str:
        """Which installation answers; empty where its gateway was started by hand. Needs no valid token."""
        return self._transport.installation_id()

    def sign_in_link(self) -> SignInLink:
        """A link that signs one browser in, once."""
        return decode(SignInLink, self._transport.post("/sign-in-links"))

    def close(self) -> None:
        if "filesets" in self.__dict__:
            self.filesets.close()
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _context(url: str | None, token: str | None, name: str | None, ca: str) -> Context:
    if url is None and token is None:
        return contexts.resolve(name)
    if not (url and token):
        raise NoServer("Client() needs url and token together, or neither.", "Give both.")
    return Context("given", front_door(url), token, "the caller", ca)
