"""File sets: immutable trees of files in object storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Callable

from nabla.decoding import decode
from nabla.errors import NablaError
from nabla.manifest import LocalFile, Manifest
from nabla.objects import File, Fileset, FilesetGrant
from nabla.progress import Progress, Stages, silent, unseen
from nabla.resources.base import Resource, segment
from nabla.transfer import ExpiredUrl, Transfers

PARALLEL_TRANSFERS = 4


class Filesets(Resource):
    @cached_property
    def transfers(self) -> Transfers:
        return Transfers(self._transport.sleep, self._transport.ca)

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

    def upload(self, kind: str, project: str, manifest: Manifest, stages: Stages = unseen) -> Fileset:
        """Uploads what the server lacks and seals the set; a second time nothing is uploaded."""
        missing = len(manifest.files) + 1
        while True:
            grant = self.open(kind, project, manifest)
            try:
                return self.finish(grant, manifest.files, stages)
            except ExpiredUrl:
                if len(grant.uploads) >= missing:
                    raise  # nothing arrived since the last time
                missing = len(grant.uploads)

    def finish(self, grant: FilesetGrant, files: Sequence[LocalFile], stages: Stages = unseen) -> Fileset:
        """Uploads what a grant asks for, then seals."""
        local = {file.path: file for file in files}
        unknown = [upload.path for upload in grant.uploads if upload.path not in local]
        if unknown:
            raise NablaError(f"The server asks for {unknown[0]!r}, which is not part of this upload.")
        wanted = [(upload.url, local[upload.path]) for upload in grant.uploads]
        if wanted:
            self._put_all(wanted, stages("Uploading", sum(file.size_bytes for _, file in wanted)))
        return grant.fileset if grant.fileset.state == "sealed" else self.seal(grant.fileset.id)

    def _put_all(self, files: Sequence[tuple[str, LocalFile]], progress: Progress) -> None:
        """Several at a time; the first that fails, or Ctrl-C, ends them all without waiting for the others."""
        transfers = Transfers(self._transport.sleep, self._transport.ca)
        pool = ThreadPoolExecutor(PARALLEL_TRANSFERS)
        try:
            for upload in as_completed([pool.submit(transfers.put, url, file, progress) for url, file in files]):
                upload.result()
        except ExpiredUrl:
            raise  # what is under way is let through: it need not be sent again
        except BaseException:
            transfers.abort()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            transfers.close()

    def seal(self, fileset_id: str) -> Fileset:
        return decode(Fileset, self._transport.post(f"/filesets/{segment(fileset_id)}/seal"))

    def get(self, fileset_id: str) -> Fileset:
        return decode(Fileset, self._transport.get(f"/filesets/{segment(fileset_id)}"))

    def files(self, fileset_id: str) -> Iterator[File]:
        """The files, each with a URL to GET it from for some minutes."""
        return self._paged(f"/filesets/{segment(fileset_id)}/files", File, {}, None)

    def download(
        self, listed: Callable[[], Iterator[File]], folder: Path, progress: Progress | None = None
    ) -> list[Path]:
        """Fetches files below `folder`, page by page; listed anew when their URLs grow old before they are used."""
        done: dict[str, Path] = {}
        while True:
            before = len(done)
            try:
                for file in listed():
                    if file.path not in done:
                        done[file.path] = self.transfers.fetch(file, folder, progress or silent)
                return list(done.values())
            except ExpiredUrl:
                if len(done) == before:
                    raise
