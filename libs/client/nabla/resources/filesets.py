"""File sets: immutable trees of files in object storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from nabla.decoding import decode
from nabla.errors import NablaError
from nabla.manifest import LocalFile, Manifest
from nabla.objects import File, Fileset, FilesetGrant
from nabla.resources.base import Resource, segment
from nabla.transfer import ExpiredUrl, Progress, Transfers, silent

PARALLEL_TRANSFERS = 4


class Filesets(Resource):
    @cached_property
    def transfers(self) -> Transfers:
        return Transfers(self._transport.sleep)

    def close(self) -> None:
        if "transfers" in self.__dict__:
            self.transfers.close()

    def open(self, kind: str, project: str, manifest: Manifest, job_id: str = "", attempt: int = 0) -> FilesetGrant:
        """Asks where to put the files; nothing is asked for when the server has this digest already."""
        body: dict[str, object] = {
            "kind": kind,
            "project_id": project,
            "digest": manifest.digest,
            "files": [file.as_json() for file in manifest.files],
        }
        if job_id:
            body.update(job_id=job_id, attempt=attempt)
        return decode(FilesetGrant, self._transport.post("/filesets", body))

    def upload(self, kind: str, project: str, manifest: Manifest, progress: Progress = silent) -> Fileset:
        """Uploads what the server lacks and seals the set; a second time nothing is uploaded."""
        grant = self.open(kind, project, manifest)
        try:
            return self.finish(grant, manifest.files, progress)
        except ExpiredUrl:
            return self.finish(self.open(kind, project, manifest), manifest.files, progress)

    def finish(self, grant: FilesetGrant, files: Sequence[LocalFile], progress: Progress = silent) -> Fileset:
        """Uploads what a grant asks for, then seals."""
        local = {file.path: file for file in files}
        unknown = [upload.path for upload in grant.uploads if upload.path not in local]
        if unknown:
            raise NablaError(f"The server asks for {unknown[0]!r}, which is not part of this upload.")
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            put = [pool.submit(self.transfers.put, u.url, local[u.path], progress) for u in grant.uploads]
            for upload in put:
                upload.result()
        return grant.fileset if grant.fileset.state == "sealed" else self.seal(grant.fileset.id)

    def seal(self, fileset_id: str) -> Fileset:
        return decode(Fileset, self._transport.post(f"/filesets/{segment(fileset_id)}/seal"))

    def get(self, fileset_id: str) -> Fileset:
        return decode(Fileset, self._transport.get(f"/filesets/{segment(fileset_id)}"))

    def files(self, fileset_id: str) -> Iterator[File]:
        """The files, each with a URL to GET it from for some minutes."""
        return self._paged(f"/filesets/{segment(fileset_id)}/files", File, {}, None)

    def download(self, files: Iterator[File], folder: Path, progress: Progress | None = None) -> list[Path]:
        """Fetches files below `folder`, page by page, so that their URLs are fresh when they are used."""
        return [self.transfers.fetch(file, folder, progress or silent) for file in files]
