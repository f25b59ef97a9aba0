"""The scheduler, the storage service and the executor, asked over the bus."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from libs.common.bus import Bus
from libs.common.contracts.messages import (
    FilePage,
    FrontDoorPass,
    GetFrontDoorPass,
    GetJob,
    GetLog,
    Job,
    JobDetail,
    ListFiles,
    LogPage,
)
from libs.common.errors import NotFound
from services.serving.domain.front import Pass
from services.serving.store import service_principal

BENTO = "bento/bento.yaml"


class BusPeers:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def job(self, job_id: str, team_id: str) -> Job | None:
        try:
            detail = await self._bus.ask(GetJob(job_id=job_id), JobDetail, service_principal(team_id))
        except NotFound:
            return None
        return detail.job

    async def bento_of(self, build_job_id: str, team_id: str) -> str:
        cursor = ""
        while True:
            question = ListFiles(job_id=build_job_id, cursor=cursor)
            try:
                page = await self._bus.ask(question, FilePage, service_principal(team_id))
            except NotFound:
                return ""
            if any(file.path == BENTO for file in page.items):
                return page.fileset.id
            if not page.next_cursor:
                return ""
            cursor = page.next_cursor

    async def last_lines(self, job_id: str, team_id: str, count: int) -> tuple[list[str], bool]:
        try:
            page = await self._bus.ask(GetLog(job_id=job_id, after=-count), LogPage, service_principal(team_id))
        except NotFound:
            return [], False
        return [line.text for line in page.lines], page.complete


class BusPasses:
    """Args: key: the front door's own, 32 bytes; it goes nowhere but into the proxy's configuration."""

    def __init__(self, bus: Bus, key: bytes) -> None:
        self._bus = bus
        self._key = Ed25519PrivateKey.from_private_bytes(key)

    async def front_door(self) -> Pass:
        public = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        signed = await self._bus.ask(GetFrontDoorPass(public_key=public), FrontDoorPass, service_principal(""))
        private = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Pass(signed.certificate, private, signed.authority)
