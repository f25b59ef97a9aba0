"""Jobs: start, watch, stop, and fetch what they leave behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Union

from nabla.decoding import as_json, decode
from nabla.errors import ApiError, NablaError, Unavailable, Unreachable
from nabla.objects import (
    File,
    Job,
    JobDetail,
    JobExplanation,
    JobTemplate,
    LogLine,
    LogPage,
    MetricPage,
    Resources,
    Run,
    Series,
)
from nabla.progress import Stages, unseen
from nabla.resources.base import Resource, segment
from nabla.resources.experiments import Experiments
from nabla.sse import EventParser, ServerEvent
from nabla.transport import FIRST_DELAY_S, LONGEST_DELAY_S, Transport

if TYPE_CHECKING:
    from nabla.resources.filesets import Filesets

JobEvent = Union[LogLine, Job]
# How long a stream may stay away before following gives up; jobs outlive a restart of any service.
RECONNECT_S = 600.0


class Jobs(Resource):
    def __init__(self, transport: Transport, filesets: Callable[[], Filesets], experiments: Experiments) -> None:
        super().__init__(transport)
        self._filesets = filesets
        self._experiments = experiments

    def run(
        self,
        command: Sequence[str],
        *,
        project: str,
        name: str = "",
        folder: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        resources: Resources | None = None,
    ) -> Job:
        """Starts one job, with `folder` (if given) as its workspace. For all else, fill a JobTemplate."""
        workspace_id, origin = "", {}
        if folder is not None:
            from nabla.packing import pack

            workspace = pack(Path(folder))
            workspace_id = workspace.upload(self._filesets(), project).id
            origin = workspace.origin
        template = JobTemplate(
            name=name or "run",
            command=tuple(command),
            env=dict(env or {}),
            resources=resources or Resources(),
            workspace_id=workspace_id,
            origin=origin,
        )
        return self._experiments.start(project, template.name, template).jobs[0]

    def submit(self, project: str, template: JobTemplate, experiment_id: str = "") -> Job:
        """A job of its own, or one more of an experiment."""
        body: dict[str, object] = {"project_id": project, "template": as_json(template)}
        if experiment_id:
            body["experiment_id"] = experiment_id
        return decode(Job, self._transport.post("/jobs", body))

    def list(self, project: str = "", state: str = "", kind: str = "", limit: int | None = None) -> Iterator[Job]:
        """Newest first; `kind` "any" shows builds and replicas too."""
        return self._paged("/jobs", Job, {"project_id": project, "state": state, "kind": kind}, limit)

    def get(self, job_id: str) -> JobDetail:
        return decode(JobDetail, self._transport.get(f"/jobs/{segment(job_id)}"))

    def stop(self, job_id: str) -> Job:
        return decode(Job, self._transport.post(f"/jobs/{segment(job_id)}/stop"))

    def retry(self, job_id: str) -> Job:
        """A new job from the template of one that has ended: the same code, environment and limits."""
        return decode(Job, self._transport.post(f"/jobs/{segment(job_id)}/retry"))

    def clone(self, job_id: str, changes: Mapping[str, object], resources: Resources | None = None) -> Job:
        """A new job from another's template. `changes` may have name, command, env (set over the job's own),
        machine_type, priority, timeout_s and max_retries; of `resources` what is not zero counts."""
        body = dict(changes)
        if resources is not None:
            body["resources"] = as_json(resources)
        return decode(Job, self._transport.post(f"/jobs/{segment(job_id)}/clone", body))

    def explain(self, job_id: str) -> JobExplanation:
        """Why the job is in its state; of a waiting one, what it waits for."""
        return decode(JobExplanation, self._transport.get(f"/jobs/{segment(job_id)}/explain"))

    def log_page(self, job_id: str, after: int = 0, limit: int = 1000) -> LogPage:
        """Lines after a sequence number; the last -after lines when it is negative."""
        answer = self._transport.get(f"/jobs/{segment(job_id)}/logs", {"after": after, "limit": limit})
        return decode(LogPage, answer)

    def logs(self, job_id: str, after: int = 0) -> Iterator[LogLine]:
        """The lines there are now, each once and in order, without waiting for more."""
        while True:
            page = self.log_page(job_id, after)
            yield from page.lines
            if not page.lines or page.lines[-1].sequence >= page.last_sequence:
                return
            after = page.lines[-1].sequence

    def tail(self, job_id: str, count: int) -> Sequence[LogLine]:
        return (self.log_page(job_id, -count, count).lines) if count > 0 else ()

    def follow(self, job_id: str, after: int = 0) -> Iterator[LogLine]:
        """Every line after `after` until the job has ended and its log is whole; see `watch`."""
        return (event for event in self.watch(job_id, after) if isinstance(event, LogLine))

    def watch(self, job_id: str, after: int = 0, unfinished: Callable[[LogLine], object] = bool) -> Iterator[JobEvent]:
        """Log lines as they come and the job at each change of its state; the last item is the ended job.

        Args:
            unfinished: told what the job shows on a line that it has not ended, such as a progress bar, while it moves;
                empty when that is over.

        A broken stream is opened again after the last line seen, so no line is lost or comes twice. Gives up, with
        the error, when ten minutes of trying brought no answer; a job may be silent for as long as it likes.
        """
        last, delay_s, silent_since, heard = after, FIRST_DELAY_S, 0.0, False
        while True:
            failure: NablaError = Unreachable("The log stream ended before the job did.")
            try:
                for events in self._stream(job_id, last):
                    delay_s, silent_since, heard = FIRST_DELAY_S, 0.0, True
                    for event in events:
                        if event.event == "unfinished":
                            unfinished(decode(LogLine, json.loads(event.data)))
                        item = _job_event(event)
                        if isinstance(item, LogLine):
                            if item.sequence <= last:
                                continue
                            last = item.sequence
                        if item is not None:
                            yield item
                        if event.event == "end":
                            return
            except (Unreachable, ApiError) as error:
                if not _may_pass(error, heard):
                    raise
                failure = error
            now = time.monotonic()
            silent_since = silent_since or now
            left_s = silent_since + RECONNECT_S - now
            if left_s < 0:
                raise failure
            self._transport.tell_retry(failure, left_s)
            self._transport.sleep(delay_s)
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def _stream(self, job_id: str, after: int) -> Iterator[Sequence[ServerEvent]]:
        """The events in each piece that arrives; none in the comments that only say that the server is there."""
        parser = EventParser()
        path, last_id = f"/jobs/{segment(job_id)}/logs/stream", str(after) if after else ""
        with self._transport.stream(path, {"after": after}, last_id) as chunks:
            for chunk in chunks:
                yield tuple(parser.feed(chunk))

    def artifacts(self, job_id: str) -> Iterator[File]:
        """What the newest attempt left in /artifacts; nothing while it runs."""
        return self._paged(f"/jobs/{segment(job_id)}/artifacts", File, {}, None)

    def download_artifacts(self, job_id: str, folder: Path, stages: Stages = unseen) -> Sequence[Path]:
        told = stages("Downloading", None)
        return self._filesets().download(lambda: self.artifacts(job_id), folder, told)

    def metrics(self, job_id: str, name: str = "", max_points: int | None = None) -> Sequence[Series]:
        params = {"name": name, "max_points": max_points}
        answer = self._transport.get(f"/jobs/{segment(job_id)}/metrics", params)
        return decode(MetricPage, answer).items

    def log_metrics(self, job_id: str, points: Sequence[Mapping[str, object]]) -> Run:
        """Adds points ({name, value, step}) from outside the job."""
        body = {"points": [dict(point) for point in points]}
        return decode(Run, self._transport.post(f"/jobs/{segment(job_id)}/metrics", body))

    def tracked(self, job_id: str) -> Run:
        """Parameters, tags and the last value of each metric."""
        return decode(Run, self._transport.get(f"/jobs/{segment(job_id)}/run"))


def _may_pass(error: NablaError, heard: bool) -> bool:
    """Whether following goes on in spite of an error.

    While the platform's front door starts again it may answer 500, or 404 as it does not know its own routes yet;
    a 404 of the platform itself has a code.
    """
    if not isinstance(error, ApiError):
        return True
    if error.status == HTTPStatus.NOT_FOUND:
        return heard and not error.code
    return isinstance(error, Unavailable) or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _job_event(event: ServerEvent) -> JobEvent | None:
    if event.event == "line":
        return decode(LogLine, json.loads(event.data))
    if event.event in ("state", "end"):
        return decode(Job, json.loads(event.data))
    return None
