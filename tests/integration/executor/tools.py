"""A node's toolbox without an agent, packages made by hand, and the servers that tools are to reach."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from services.executor.adapters.agent.folder_watch import FolderWatch
from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.job_spec import NodeFacts
from services.executor.adapters.attempts.shim import write_contact
from services.executor.adapters.environments.toolbox import Toolbox
from services.executor.adapters.runtimes import isolation
from services.executor.adapters.runtimes.sandbox import find_bwrap
from services.executor.domain.network import Network
from tests.integration.executor.attempts import why_no_bwrap

ROOT = Path(__file__).resolve().parents[3]
GIT_BACKEND = Path("/usr/lib/git-core/git-http-backend")


class ToolNode:
    """A node folder with a zygote, and the toolbox in it."""

    def __init__(self, path: Path, socket: Path, wanted: str) -> None:
        self.path = path
        self.socket = socket
        write_contact(path / "contact.json")
        facts = NodeFacts(
            node_id="n1",
            hostname="node",
            node_dir=path,
            storage_root=path / "storage",
            client_folder=ROOT / "libs" / "client",
            front_door="http://127.0.0.1:1",
            isolation="process" if wanted == "process" else "bwrap",
            isolation_detail="",
            bwrap_path=find_bwrap(isolation.wheel_bwrap()) or "/usr/bin/bwrap",
            contact_file=path / "contact.json",
            fence_s=3600.0,
            log_limit_bytes=1_000_000_000,
            disk_reserve_bytes=0,
            network=Network(),
        )
        self.toolbox = Toolbox(facts, FolderWatch(), self._start)

    async def _start(self, folder: Path) -> None:
        await asyncio.to_thread(zygote.start_attempt, self.socket, folder)

    def leftovers(self) -> list[str]:
        """What tools left: folders, and processes with a tool's mark."""
        found = [str(path) for path in (self.path / "tools" / "attempts").glob("*")]
        found += [str(path) for path in (self.path / "fetching").glob("*")]
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if str(self.path / "tools").encode() in Path("/proc", name, "cmdline").read_bytes():
                    found.append(name)
        return found


@asynccontextmanager
async def tool_node(wanted: str = "bwrap") -> AsyncIterator[ToolNode]:
    path = Path(tempfile.mkdtemp(prefix="nabla-node-"))
    path.chmod(0o711)
    process = zygote.start_zygote(path / "zygote.sock")
    try:
        yield ToolNode(path, path / "zygote.sock", wanted)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(path, ignore_errors=True)


def why_no_walls() -> str:
    return why_no_bwrap()


def make_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], requires: str = "") -> Path:
    info = f"{name}-{version}.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    contents = dict(files) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in contents.items())
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in (contents | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(inner, text)
    return path


def _digest(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


_BACKEND = """
import os, runpy, sys, zipfile
def _run():
    runpy.run_path("on_build.py")
def prepare_metadata_for_build_wheel(folder, settings=None):
    _run()
    info = os.path.join(folder, "NAME-1.0.dist-info")
    os.makedirs(info)
    open(os.path.join(info, "METADATA"), "w").write("Metadata-Version: 2.1\\nName: NAME\\nVersion: 1.0\\n")
    return "NAME-1.0.dist-info"
def build_wheel(folder, settings=None, metadata=None):
    name = "NAME-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as out:
        out.writestr("NAME.py", "built = True")
        out.writestr("NAME-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: NAME\\nVersion: 1.0\\n")
        out.writestr("NAME-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        out.writestr("NAME-1.0.dist-info/RECORD", "")
    return name
"""  # noqa: E501
_BUILD = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def make_sdist(folder: Path, name: str, on_build: str) -> Path:
    """A package that must be built, with a backend of its own that runs this code."""
    path = folder / f"{name}-1.0.tar.gz"
    contents = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        "pyproject.toml": _BUILD,
        "backend.py": _BACKEND.replace("NAME", name),
        "on_build.py": on_build,
    }
    with tarfile.open(path, "w:gz") as archive:
        for inner, text in contents.items():
            member = tarfile.TarInfo(f"{name}-1.0/{inner}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Serves a folder on the loopback: the port, and what it was asked for."""
    with _serving(functools.partial(_Quiet, directory=str(folder))) as (port, asked):
        yield port, asked


@contextmanager
def package_index(files: Path) -> Iterator[tuple[int, list[str]]]:
    """A package index over HTTP with these files."""
    root = Path(tempfile.mkdtemp(prefix="nabla-index-"))
    try:
        for path in files.iterdir():
            name = path.name.split("-")[0]
            folder = root / "simple" / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
            links = "".join(f'<a href="{one.name}">{one.name}</a>' for one in folder.iterdir() if one.suffix != ".html")
            (folder / "index.html").write_text(links)
        with web_server(root) as found:
            yield found
    finally:
        shutil.rmtree(root)


class _Git(http.server.BaseHTTPRequestHandler):
    """Hands requests to git's own CGI program, as a web server does."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve(body)

    def _serve(self, body: bytes) -> None:
        server: GitHost = self.server.host  # type: ignore[attr-defined]
        path, _, query = self.path.partition("?")
        server.asked.append(self.path)
        given = self.headers.get("Authorization", "")
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect + self.path)
            self.end_headers()
            return
        if server.credentials and given != "Basic " + base64.b64encode(server.credentials.encode()).decode():
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        env = {
            "GIT_PROJECT_ROOT": str(server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run([str(GIT_BACKEND)], input=body, capture_output=True, env=env, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        return


class GitHost:
    """A real repository behind real smart HTTP, on the loopback."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.credentials = ""
        self.redirect = ""
        self.port = 0
        self.work = root / "work"
        self.work.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/work/.git"

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def git(self, *words: str) -> str:
        names = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "GIT_CONFIG_GLOBAL": "/dev/null"} | names
        done = subprocess.run(["git", *words], cwd=self.work, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, files: Mapping[str, str]) -> str:
        for name, text in files.items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "-A", "-f")
        self.git("commit", "-q", "-m", "change")
        return self.git("rev-parse", "HEAD")


@contextmanager
def git_host(root: Path) -> Iterator[GitHost]:
    host = GitHost(root)
    with _serving(_Git, host) as (port, _):
        host.port = port
        yield host


@contextmanager
def _serving(handler: object, host: GitHost | None = None) -> Iterator[tuple[int, list[str]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.host = host  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
