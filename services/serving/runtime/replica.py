"""Becomes `bentoml serve` of the bento in `$NABLA_WORKSPACE/bento`, inside a replica job.

    python -c <this file> PORT

The endpoint admits bearer tokens by their SHA-256 hashes, given in `NABLA_ENDPOINT_HASHES`, separated by spaces.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile

PORT_TAKEN = 98


def main() -> None:
    port = int(sys.argv[1])
    claim(port)
    bento = bento_below(os.path.join(os.environ["NABLA_WORKSPACE"], "bento"))
    scratch = tempfile.mkdtemp(prefix="nabla-replica-")
    os.environ.update(
        HOME=scratch,
        BENTOML_HOME=os.path.join(scratch, "bentoml"),
        BENTOML_DO_NOT_TRACK="True",
        # One request is one small matrix: threads of BLAS only get in each other's way.
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )
    serve = ["-m", "bentoml", "serve", bento, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *serve])


def bento_below(folder: str) -> str:
    """The folder with bento.yaml: the input holds all artifacts of the build, of which the bento is one folder."""
    for candidate in (folder, os.path.join(folder, "bento")):
        if os.path.exists(os.path.join(candidate, "bento.yaml")):
            return candidate
    print(f"There is no bento in {folder}.", file=sys.stderr, flush=True)
    sys.exit(1)


def claim(port: int) -> None:
    """Ends the job at once when another process of this machine has the port; the next replica tries another."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            print(f"Port {port} is taken: {error}", file=sys.stderr, flush=True)
            sys.exit(PORT_TAKEN)


if __name__ == "__main__":
    main()
