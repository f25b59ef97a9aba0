"""Keeps a zygote for the node agent: starts it, and another one when it dies or does not answer any more."""

from __future__ import annotations

import logging
import subprocess
import tempfile
import threading
from pathlib import Path

from services.executor.adapters.attempts import zygote
from services.executor.domain.network import Network

LONGEST_SOCKET_PATH = 100
ANSWERS_S = 10.0

log = logging.getLogger(__name__)


class ZygoteKeeper:
    """The zygote process of this agent; it ends by itself when the agent does."""

    def __init__(self, folder: Path) -> None:
        path = folder / "zygote.sock"
        if len(str(path)) > LONGEST_SOCKET_PATH:
            path = Path(tempfile.mkdtemp(prefix="nabla-agent-")) / "zygote.sock"
        self.socket_path = path
        self._guard = threading.Lock()
        self._ended = False
        self._warm: tuple[Network, list[int]] | None = None
        self.process: subprocess.Popen[bytes] = zygote.start_zygote(path)

    def start_attempt(self, attempt_dir: Path, secrets: bytes = b"", answers_s: float = ANSWERS_S) -> int:
        """Has the attempt's shim started, with the values that it is handed; its pid. Called from threads.

        Raises:
            ZygoteUnavailable: it did not answer; there is another one now, unless the keeper was ended, and
                asking again does no harm.
            StartFailed.
        """
        self.revive()
        asked = self.process
        if self._ended:
            raise zygote.ZygoteUnavailable("the node agent leaves")
        try:
            return zygote.start_attempt(self.socket_path, attempt_dir, answers_s, secrets=secrets)
        except zygote.ZygoteUnavailable:
            self.replace(asked)
            raise

    def keep_warm(self, network: Network, door_ports: list[int]) -> None:
        """Has networks such as this one kept ready, by this zygote and each that follows it. Called from threads."""
        with self._guard:
            self._warm = network, door_ports
            self._tell_warm()

    def revive(self) -> None:
        """Starts another one if it died. Called from threads."""
        with self._guard:
            if self.process.poll() is not None and not self._ended:
                self._start()

    def replace(self, silent: subprocess.Popen[bytes]) -> None:
        """Ends the one that did not answer, unless another caller has, and starts the next. Called from threads.

        Its shims live on; a shim that it forks in its last moment is found by its folder.
        """
        with self._guard:
            if self.process is silent and not self._ended:
                log.warning("the zygote lives and does not answer: it is replaced", extra={"zygote": silent.pid})
                silent.kill()
                silent.wait()
                self._start()

    def _start(self) -> None:
        self.process = zygote.start_zygote(self.socket_path)
        self._tell_warm()

    def _tell_warm(self) -> None:
        """A zygote that does not hear of it has attempts make their own."""
        if self._warm and not self._ended:
            try:
                zygote.keep_warm(self.socket_path, *self._warm)
            except zygote.ZygoteUnavailable as error:
                log.warning("no networks are made ahead", extra={"reason": str(error)})

    def end(self) -> None:
        """For good. A start that is under way in a thread fails, and its shim, if it came to be, lives on."""
        with self._guard:
            self._ended = True
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # it hangs, or somebody stopped it
            self.process.kill()
            self.process.wait()
