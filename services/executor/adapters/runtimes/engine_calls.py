"""Commands to the container engine that the node agent waits for, and the credentials for one of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from libs.common.contracts.messages import Container
from services.executor.adapters.runtimes.engine import Engine
from services.executor.adapters.runtimes.podman import podman_environment
from services.executor.domain.images import registry_of

ASK_LIMIT_S = 60.0
LAST_LINES = 10
AUTH_PREFIX = ".auth-"
_NOISE = ("Getting image source signatures", "Storing signatures", "Writing manifest")

Tell = Callable[[str], None]


@contextlib.contextmanager
def auth_file(folder: Path, container: Container) -> Iterator[Path]:
    """Credentials for one pull, gone after it. Without any an empty file: the engine would use the platform's own."""
    auths = {}
    if container.registry_username or container.registry_password:
        pair = f"{container.registry_username}:{container.registry_password}".encode()
        auths[registry_of(container.image)] = {"auth": base64.b64encode(pair).decode()}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=AUTH_PREFIX, dir=folder)  # 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"auths": auths}, file)
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)


async def ask(
    engine: Engine, words: Sequence[str], limit_s: float = ASK_LIMIT_S, folder: Path | None = None
) -> tuple[int, str, str]:
    """Args: folder: where the engine is run."""
    process = await _begin(engine, words, folder)
    async with _ended(process):
        async with asyncio.timeout(limit_s):
            out, err = await process.communicate()
    return process.returncode or 0, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


async def follow(engine: Engine, words: Sequence[str], limit_s: float, tell: Tell) -> tuple[int, str]:
    """Runs a long command and tells its lines as they come: its exit code, and what it said last."""
    process = await _begin(engine, words)
    said: deque[str] = deque(maxlen=LAST_LINES)
    async with _ended(process):
        try:
            async with asyncio.timeout(limit_s):
                assert process.stderr
                async for raw in process.stderr:
                    line = raw.decode("utf-8", "replace").strip()
                    said.append(line)
                    if line and not line.startswith(_NOISE):
                        tell(line)
                await process.wait()
        except TimeoutError:
            return 1, f"Error: it was not there within {limit_s:.0f} s"
    return process.returncode or 0, "\n".join(said)


async def _begin(engine: Engine, words: Sequence[str], folder: Path | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *engine.command,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=podman_environment(),
        cwd=folder,
    )


@asynccontextmanager
async def _ended(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """Nobody waits for it any more: it ends too."""
    try:
        yield
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
