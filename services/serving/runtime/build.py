"""Makes a bento of a model, inside a sandboxed build job: the first and only place where a build loads a model.

Reads `$NABLA_WORKSPACE/model`, writes `$NABLA_ARTIFACTS/bento`. What is wrong with the model is said in the last
line of the log, for the person who deploys it, and ends the job with 1.

    python -c <this file> '{"framework": "sklearn", "name": "digits", "version": 3}' <text of endpoint.py>
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SKLEARN = ("sklearn", "scikit-learn")
SUFFIXES = (".joblib", ".pkl", ".pickle")


class Refused(Exception):
    """What is wrong with the model, for the person who deploys it."""


def main() -> NoReturn:
    signal.signal(signal.SIGTERM, stop)
    code = 1
    try:
        with private_home() as scratch:
            bento_of_model(scratch, json.loads(sys.argv[1]), sys.argv[2])
        code = 0
    except Refused as refused:
        sys.stdout.flush()
        print(refused, file=sys.stderr, flush=True)
    except SystemExit as asked:
        # A model that calls exit(0) has not been built.
        code = asked.code if isinstance(asked.code, int) and asked.code else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a half-loaded model must not keep the job alive.
    os._exit(code)


def stop(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def bento_of_model(scratch: Path, wanted: dict[str, Any], endpoint: str) -> None:
    if wanted["framework"].lower() not in SKLEARN:
        raise Refused(f"The framework {wanted['framework']!r} cannot be served yet; what can be is sklearn.")
    source = scratch / "source"
    source.mkdir()
    file = model_file(Path(os.environ["NABLA_WORKSPACE"]) / "model")
    say(f"loading {file.name} ({file.stat().st_size} bytes)")
    facts = describe(load(file), file.name)
    say(f"loaded a {facts['class']}; {facts['feature_count'] or 'an unknown number of'} features a row")
    shutil.copyfile(file, source / ("model" + file.suffix))
    (source / "model.json").write_text(json.dumps(wanted | facts | {"file": "model" + file.suffix}))
    (source / "service.py").write_text(endpoint)
    target = Path(os.environ["NABLA_ARTIFACTS"]) / "bento"
    build(source, target, wanted)
    say(f"the bento of {wanted['name']} version {wanted['version']} is built")


@contextlib.contextmanager
def private_home() -> Iterator[Path]:
    """A folder of this run's own for everything that BentoML wants to write; gone with the run, however it ends."""
    scratch = Path(tempfile.mkdtemp(prefix="nabla-build-"))
    os.environ.update(HOME=str(scratch), BENTOML_HOME=str(scratch / "bentoml"), BENTOML_DO_NOT_TRACK="True")
    # One row is predicted here: threads of BLAS would only wait for each other (measured: eight times slower).
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def model_file(folder: Path) -> Path:
    """The one file to serve: named by its suffix, or the only one there is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    fitting = [path for path in files if path.suffix in SUFFIXES] or files
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(str(path.relative_to(folder)) for path in files) or "nothing"
    raise Refused(f"A model to serve is one file ({' '.join(SUFFIXES)}); this one holds {listed}.")


def load(file: Path) -> Any:
    import joblib

    try:
        return joblib.load(file)
    except ModuleNotFoundError as error:
        raise Refused(
            f"The model file {file.name} needs the module {error.name!r}, which this environment does not have."
        ) from error
    except Exception as error:
        raise Refused(f"The model file {file.name} cannot be loaded: {type(error).__name__}: {error}") from error


def describe(model: Any, name: str) -> dict[str, Any]:
    """What the endpoint has to know of the model, once it has answered a row of zeros."""
    import numpy as np

    if not callable(getattr(model, "predict", None)):
        raise Refused(f"The model file {name} holds a {type(model).__name__}, which has no predict().")
    features = int(getattr(model, "n_features_in_", 0))
    probabilities = callable(getattr(model, "predict_proba", None))
    if features:
        try:
            answers = len(model.predict([[0.0] * features]))
            # One matrix; models with several outputs give a list of them, which the endpoint leaves out.
            probabilities = probabilities and np.ndim(model.predict_proba([[0.0] * features])) == 2
        except Exception as error:
            raise Refused(
                f"The model in {name} fails on a row of {features} zeros: {type(error).__name__}: {error}"
            ) from error
        if answers != 1:
            raise Refused(f"The model in {name} gave {answers} predictions for one row.")
    return {"feature_count": features, "probabilities": probabilities, "class": type(model).__name__}


def build(source: Path, target: Path, wanted: dict[str, Any]) -> None:
    import bentoml

    # The environment is the job's own: nothing is resolved or downloaded for it.
    python = {"lock_packages": False, "packages": []}
    pretend_uv(Path(os.environ["HOME"]) / "bin")
    labels = {"model": wanted["name"], "version": str(wanted["version"])}
    bento = bentoml.build(
        "service:Endpoint", name="nabla-endpoint", labels=labels, build_ctx=str(source), python=python
    )
    shutil.copytree(bento.path, target, dirs_exist_ok=True)


def pretend_uv(folder: Path) -> None:
    """BentoML looks for uv even when it has nothing to lock, and would download it: let it find one it never calls."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "uv"
    program.write_text("#!/bin/sh\necho 'packages are not locked here' >&2\nexit 1\n")
    program.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
