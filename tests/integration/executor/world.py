"""The executor's neighbours, small: storage and registry that answer on a real NATS, and an object store over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from infra.local import nats as local_nats
from libs.common.clock import utc_now
from libs.common.contracts.envelope import ANSWER_OK, ANSWER_REFUSED, STATUS_HEADER, Envelope
from libs.common.contracts.message import Message
from libs.common.contracts.messages import (
    File,
    FilePage,
    Fileset,
    FilesetGrant,
    GetLog,
    ListFiles,
    LogFrame,
    LogLine,
    LogPage,
    ModelVersion,
    OpenFileset,
    Principal,
    RegisterModel,
    ReportExecution,
    RevealedSecret,
    RevealedSecrets,
    RevealSecrets,
    SealFileset,
)
from libs.common.contracts.problem import problem_of
from libs.common.contracts.subjects import LOGS, stream_of, subject_for
from libs.common.errors import NotFound, Refusal, Unavailable
from libs.common.ids import new_id
from libs.common.loglines import Slice
from libs.common.secret_transfer import Writer
from services.executor.routes import AGENT_SENDS, routes
from tests.support.nats import NatsServer

NEIGHBOURS = "neighbours"
TEAM = "t0team"
PROJECT = "pr0project"


def grants() -> list[local_nats.Grant]:
    """The executor's and its agents' own rights, and a user who plays everyone else."""
    everyone_else = local_nats.Grant(
        NEIGHBOURS,
        publish=("$JS.API.>", "$JS.ACK.>", "nabla.cmd.>", "nabla.evt.>", "nabla.qry.>", "nabla.req.>"),
        subscribe=(f"_INBOX_{NEIGHBOURS}.>", "nabla.>"),
        answers=True,
    )
    return [local_nats.grant_for(routes()), local_nats.agent_grant(AGENT_SENDS), everyone_else]


class ObjectStore:
    """Keeps what is PUT and gives it back; `away` makes it answer 503, and while `answers` is not set it hangs."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.away = False
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                store.asked += 1
                store.answers.wait()
                if not store.away:
                    store.objects[self.path] = body
                self._answer(503 if store.away else 200, b"")

            def do_GET(self) -> None:
                body = store.objects.get(self.path)
                store.asked += 1
                if store.away or body is None:
                    self._answer(503 if store.away else 404, b"")
                else:
                    self._answer(200, body)

            def _answer(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Neighbours:
    """Storage, registry and an onlooker in one."""

    client: Client
    objects: ObjectStore
    filesets: dict[str, tuple[Fileset, tuple[File, ...]]] = field(default_factory=dict)
    models: list[RegisterModel] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sealed_logs: set[str] = field(default_factory=set)
    secrets: dict[str, str] = field(default_factory=dict)
    silent_about_secrets: bool = False
    # Questions that get an answer nobody can read.
    garbled: set[str] = field(default_factory=set)

    async def serve(self) -> None:
        await self._answer(ListFiles, self._list)
        await self._answer(OpenFileset, self._open)
        await self._answer(SealFileset, self._seal)
        await self._answer(RegisterModel, self._register)
        await self._answer(GetLog, self._read_log)
        await self._answer(RevealSecrets, self._reveal)

    def put_fileset(self, contents: Mapping[str, bytes], kind: str = "workspace") -> str:
        fileset_id = new_id("fileset")
        files = []
        for path, content in contents.items():
            key = f"/{fileset_id}/{path}"
            self.objects.objects[key] = content
            digest = hashlib.sha256(content).hexdigest()
            files.append(File(path=path, size_bytes=len(content), sha256=digest, url=self.objects.url + key))
        fileset = Fileset(id=fileset_id, team_id=TEAM, kind=kind, state="sealed", file_count=len(files))
        self.filesets[fileset_id] = (fileset, tuple(files))
        return fileset_id

    def put_workspace(self, contents: Mapping[str, bytes]) -> str:
        return self.put_fileset({"workspace.tar.gz": tar_gz(contents)})

    def sealed(self, kind: str, job_id: str) -> dict[str, bytes]:
        """The content of the newest sealed file set of a job."""
        for fileset, files in reversed(list(self.filesets.values())):
            if (fileset.kind, fileset.job_id, fileset.state) == (kind, job_id, "sealed"):
                return {file.path: self.objects.objects[f"/{fileset.id}/{file.path}"] for file in files}
        return {}

    async def frames(self, job_id: str) -> list[LogFrame]:
        """What the LOG stream has stored of a job."""
        jetstream = self.client.jetstream(timeout=5)
        last = (await jetstream.stream_info(LOGS)).state.last_seq
        messages = [await jetstream.get_msg(LOGS, sequence) for sequence in range(1, last + 1)]
        frames = [LogFrame.from_wire(message.data or b"") for message in messages]
        return [frame for frame in frames if frame.job_id == job_id]

    async def log(self, job_id: str, rank: int = 0) -> list[LogLine]:
        """The whole log of a rank, demanding that no line is missing or double."""
        lines: list[LogLine] = []
        frames = [frame for frame in await self.frames(job_id) if frame.rank == rank]
        for frame in sorted(frames, key=lambda frame: frame.first_line):
            assert frame.first_line == len(lines), "the frames do not follow each other"
            lines += Slice.from_message(frame.slice).of(frame.attempt, frame.rank).lines()
        return lines

    async def send(self, message: Message, object_id: str, team_id: str = TEAM, message_id: str = "") -> None:
        envelope = Envelope(
            id=message_id or new_id("event"),
            type=message.ROUTE.type,
            source="scheduler",
            time=utc_now(),
            object_id=object_id,
            team_id=team_id,
            project_id=PROJECT,
            sender=Principal(kind="service", id="scheduler", team_id=team_id),
        )
        subject = subject_for(type(message), team=team_id, object_id=object_id)
        stream = stream_of(message.ROUTE)
        await self.client.jetstream(timeout=5).publish(
            subject, message.to_wire(), stream=stream, headers=envelope.headers()
        )

    async def _answer(self, kind: type[Message], handle: Callable[[Any], Message]) -> None:
        async def answer(raw: Msg) -> None:
            self.asked.append(kind.__name__)
            try:
                body, status = handle(kind.from_wire(raw.data)).to_wire(), ANSWER_OK
            except Refusal as error:
                body, status = problem_of(error).model_dump_json().encode(), ANSWER_REFUSED
            if kind.__name__ in self.garbled:
                body = b"]"
            await self._respond(raw, body, status)

        await self.client.subscribe(subject_for(kind), cb=answer)

    async def _respond(self, raw: Msg, body: bytes, status: str) -> None:
        await self.client.publish(raw.reply, body, headers={STATUS_HEADER: status})

    def _list(self, question: ListFiles) -> FilePage:
        if question.fileset_id not in self.filesets:
            raise NotFound("fileset_not_found", f"There is no file set {question.fileset_id}.")
        fileset, files = self.filesets[question.fileset_id]
        where = f"{self.objects.url}/{fileset.id}"
        items = tuple(file.model_copy(update={"url": file.url or f"{where}/{file.path}"}) for file in files)
        return FilePage(fileset=fileset, items=items)

    def _read_log(self, question: GetLog) -> LogPage:
        return LogPage(sealed=question.job_id in self.sealed_logs)

    def _reveal(self, order: RevealSecrets) -> RevealedSecrets:
        """As the registry, whose rules have tests of their own."""
        if self.silent_about_secrets:
            raise Unavailable("database_busy", "The registry is busy.")
        writer = Writer(order.public_key)
        missing = [name for name in order.names if name not in self.secrets]
        if missing:
            detail = f"There is no secret {missing[0]} in this project or team."
            raise NotFound("secret_not_found", detail, f"`nabla secrets set {missing[0]}` makes it.")
        values = {name: self.secrets[name].encode() for name in order.names}
        items = (RevealedSecret(name=name, version=1, sealed=writer.seal(name, values[name])) for name in values)
        return RevealedSecrets(items=tuple(items))

    def _open(self, order: OpenFileset) -> FilesetGrant:
        fileset = Fileset(id=new_id("fileset"), kind=order.kind, state="open", digest=order.digest, job_id=order.job_id)
        self.filesets[fileset.id] = (fileset, order.files)
        uploads = tuple(
            file.model_copy(update={"url": f"{self.objects.url}/{fileset.id}/{file.path}"}) for file in order.files
        )
        return FilesetGrant(fileset=fileset, uploads=uploads)

    def _seal(self, order: SealFileset) -> Fileset:
        fileset, files = self.filesets[order.fileset_id]
        for file in files:
            content = self.objects.objects[f"/{fileset.id}/{file.path}"]
            assert hashlib.md5(content).hexdigest() == file.md5
        sealed = fileset.model_copy(update={"state": "sealed", "file_count": len(files)})
        self.filesets[fileset.id] = (sealed, files)
        return sealed

    def _register(self, order: RegisterModel) -> ModelVersion:
        self.models.append(order)
        return ModelVersion(model_name=order.name, version=len(self.models))


async def meet_neighbours(server: NatsServer, objects: ObjectStore) -> Neighbours:
    client = await nats.connect(server.url, nkeys_seed_str=server.seed(NEIGHBOURS), inbox_prefix=f"_INBOX_{NEIGHBOURS}")
    neighbours = Neighbours(client, objects)
    await neighbours.serve()
    return neighbours


async def reports(neighbours: Neighbours) -> list[ReportExecution]:
    """What agents have told the executor, where no executor takes it from the stream."""
    jetstream = neighbours.client.jetstream(timeout=5)
    state = (await jetstream.stream_info("CMD")).state
    messages = [await jetstream.get_msg("CMD", number) for number in range(max(state.first_seq, 1), state.last_seq + 1)]
    return [ReportExecution.from_wire(message.data or b"") for message in messages]


def tar_gz(contents: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, content in contents.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 60.0) -> Any:
    """Waits until the condition holds and gives its value."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        value = await condition()
        if value:
            return value
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError("it did not come true")
        await asyncio.sleep(0.02)
