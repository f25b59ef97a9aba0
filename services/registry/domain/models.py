"""Models: what a version must say about itself. Nothing here or anywhere in the registry opens a model's files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from libs.common.contracts.messages import Fileset, RegisterModel
from libs.common.errors import Conflict, Invalid
from libs.common.ids import is_id

FRAMEWORKS = (
    "sklearn",
    "xgboost",
    "lightgbm",
    "onnx",
    "pytorch",
    "tensorflow",
    "huggingface",
    "python",
    "other",
)
HOLDS_MODELS = ("model", "artifacts")
MOST_METRICS = 100
LONGEST_METRIC_NAME = 250
LONGEST_DESCRIPTION = 5_000
LONGEST_DIGEST = 200
# A detail shows so many of the newest versions; older ones are asked for by number.
VERSIONS_SHOWN = 100

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def check_version(version: RegisterModel) -> None:
    """Raises Invalid, naming what is wrong and what would be right."""
    _check_name(version.name)
    if version.framework not in FRAMEWORKS:
        detail = f"{version.framework[:50]!r} is no framework that is known here."
        raise Invalid("unknown_framework", detail, f"Use one of {', '.join(FRAMEWORKS)}.")
    if not is_id("fileset", version.fileset_id):
        raise Invalid("bad_fileset", "fileset_id is not the id of a file set.", "Upload and seal the files first.")
    if version.job_id and not is_id("job", version.job_id):
        raise Invalid("bad_job", "job_id is not the id of a job.", "Leave it empty for an uploaded model.")
    if len(version.description) > LONGEST_DESCRIPTION or "\0" in version.description:
        detail = f"A description has at most {LONGEST_DESCRIPTION:,} characters, none of them NUL."
        raise Invalid("bad_description", detail, "Shorten it.")
    digest_fits = len(version.digest) <= LONGEST_DIGEST and version.digest.isprintable()
    if not 0 <= version.size_bytes < 2**63 or not digest_fits:
        detail = f"size_bytes or digest is out of range; a digest has at most {LONGEST_DIGEST} characters."
        raise Invalid("bad_files", detail, "Send those of the sealed file set.")
    _check_metrics(version.metrics)


def check_files(files: Fileset) -> None:
    """Raises Invalid or Conflict unless these files can be a version's: those of a model, and for good."""
    if files.kind not in HOLDS_MODELS:
        detail = f"The file set {files.id} holds a {files.kind}, not a model."
        raise Invalid("not_a_model", detail, "Upload the model's folder as a file set of kind model.")
    if files.state != "sealed":
        detail = f"The file set {files.id} is {files.state}: its files may still change."
        raise Conflict("fileset_not_sealed", detail, f"Seal it first: POST /api/v1/filesets/{files.id}/seal.")


def can_be_name(text: str) -> bool:
    """Whether a model may have this name, so that looking for it makes sense."""
    return _NAME.fullmatch(text) is not None


def _check_name(name: str) -> None:
    if not can_be_name(name):
        detail = "A model's name has 1 to 100 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit."
        raise Invalid("bad_name", detail, "Choose another name, such as `digits`.")
    if is_id("model", name):
        raise Invalid("bad_name", "This name reads as the id of a model.", "Choose another name.")


def _check_metrics(metrics: Mapping[str, float]) -> None:
    if len(metrics) > MOST_METRICS or any(len(name) > LONGEST_METRIC_NAME for name in metrics):
        limits = f"at most {MOST_METRICS} metrics with names of at most {LONGEST_METRIC_NAME} characters"
        raise Invalid("too_many_metrics", f"A version has {limits}.", "Keep the ones that matter.")
    if not all(math.isfinite(value) for value in metrics.values()):
        raise Invalid("not_finite", "A metric is not a finite number.", "Leave it out.")
