"""The model repository: names, each with numbered versions that never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nabla.decoding import decode
from nabla.manifest import Manifest, PathLike, describe
from nabla.objects import Model, ModelDetail, ModelVersion
from nabla.progress import Stages, unseen
from nabla.resources.base import Resource, segment
from nabla.resources.filesets import Filesets
from nabla.transport import Transport


class Models(Resource):
    def __init__(self, transport: Transport, filesets: Filesets) -> None:
        super().__init__(transport)
        self._filesets = filesets

    def list(self, project: str = "", limit: int | None = None) -> Iterator[Model]:
        return self._paged("/models", Model, {"project_id": project}, limit)

    def get(self, model: str) -> ModelDetail:
        return decode(ModelDetail, self._transport.get(f"/models/{segment(model)}"))

    def version(self, model: str, version: int = 0) -> ModelVersion:
        """One version; 0 is the newest."""
        return decode(ModelVersion, self._transport.get(f"/models/{segment(model)}/versions/{version}"))

    def upload(
        self,
        path: PathLike | Manifest,
        *,
        name: str,
        framework: str,
        project: str,
        description: str = "",
        metrics: Mapping[str, float] | None = None,
        job_id: str = "",
        stages: Stages = unseen,
    ) -> ModelVersion:
        """Uploads a file or folder, or what `nabla.manifest.describe` found, as the next version of `name`."""
        manifest = path if isinstance(path, Manifest) else describe(path, stages)
        fileset = self._filesets.upload("model", project, manifest, stages)
        body: dict[str, object] = {
            "project_id": project,
            "framework": framework,
            "description": description,
            "fileset_id": fileset.id,
            "metrics": dict(metrics or {}),
        }
        if job_id:
            body["job_id"] = job_id
        return decode(ModelVersion, self._transport.post(f"/models/{segment(name)}/versions", body))

    def download(
        self, model: str, folder: Path, version: int = 0, stages: Stages = unseen
    ) -> tuple[ModelVersion, Sequence[Path]]:
        """Fetches the files of a version below `folder`."""
        found = self.version(model, version)
        told = stages("Downloading", found.size_bytes)
        return found, self._filesets.download(lambda: self._filesets.files(found.fileset_id), folder, told)
