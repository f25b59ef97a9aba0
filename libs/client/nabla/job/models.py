"""Registers what a job has trained, straight from the job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Dict, List, Mapping, Optional

from nabla.decoding import decode
from nabla.errors import Forbidden, NablaError, TransferError
from nabla.job.http import post, put_file
from nabla.job.identity import JobIdentity
from nabla.job.warning import warn
from nabla.manifest import Manifest, PathLike, describe
from nabla.objects import FilesetGrant, ModelVersion

PARALLEL_TRANSFERS = 4


def save_model(
    path: PathLike,
    *,
    name: str,
    framework: str,
    description: str = "",
    metrics: Optional[Mapping[str, float]] = None,
) -> ModelVersion:
    """Uploads a file or folder and registers it as the next version of the model `name`.

    The bytes go straight to object storage. Nothing is registered unless all of them arrived whole, and calling
    it again with the same files uploads nothing twice. Raises NotInJob outside a job.
    """
    identity = JobIdentity.from_environment()
    manifest = describe(path)
    if manifest.left_out:
        warn(f"left out (links to folders, which are not followed): {', '.join(manifest.left_out)}")
    fileset_id = _upload(identity, manifest)
    body: Dict[str, object] = {
        "project_id": identity.project_id,
        "framework": framework,
        "description": description,
        "fileset_id": fileset_id,
        "job_id": identity.job_id,
        "metrics": {key: float(value) for key, value in (metrics or {}).items()},
    }
    return decode(ModelVersion, post(identity, f"/models/{_quoted(name)}/versions", body))


def _upload(identity: JobIdentity, manifest: Manifest) -> str:
    files: List[Dict[str, object]] = [file.as_json() for file in manifest.files]
    body: Dict[str, object] = {
        "kind": "model",
        "project_id": identity.project_id,
        "digest": manifest.digest,
        "files": files,
        "job_id": identity.job_id,
        "attempt": identity.attempt,
    }
    missing = len(files) + 1
    while True:
        grant = decode(FilesetGrant, post(identity, "/filesets", body))
        try:
            _put_all(grant, manifest)
            break
        except TransferError as error:
            # The URLs grew old before their turn came; what has arrived is not asked for again.
            if not isinstance(error.__cause__, Forbidden) or len(grant.uploads) >= missing:
                raise
            missing = len(grant.uploads)
    if grant.fileset.state != "sealed":
        post(identity, f"/filesets/{grant.fileset.id}/seal", {})
    return grant.fileset.id


def _put_all(grant: FilesetGrant, manifest: Manifest) -> None:
    """Several at a time; after the first that fails no other begins."""
    local = {file.path: file for file in manifest.files}
    unknown = [upload.path for upload in grant.uploads if upload.path not in local]
    if unknown:
        raise NablaError(f"The server asks for {unknown[0]!r}, which is not part of the model.")
    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        wanted = [(upload.url, local[upload.path]) for upload in grant.uploads]
        started = [pool.submit(put_file, url, file.source, file.size_bytes) for url, file in wanted]
        try:
            for done in as_completed(started):
                done.result()
        finally:
            for one in started:
                one.cancel()


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
