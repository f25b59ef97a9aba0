"""Which server to talk to, and as whom.

Decided in this order, the first that says something wins:

1. a context named explicitly (`--context`, `Client(context=...)`)
2. NABLA_URL with NABLA_TOKEN
3. inside a job: NABLA_API_URL with NABLA_TOKEN
4. the installation this client was installed with: $NABLA_HOME/context.json, else <checkout>/.nabla/context.json
   where the environment is <checkout>/.venv, so that two installations side by side never meet
5. the current context of the configuration file, which `nabla login` writes
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nabla import jsonfile, paths
from nabla.address import front_door
from nabla.errors import BadConfig, NoServer


@dataclass(frozen=True)
class Context:
    """A server and a token for it; `source` says for people where they come from.

    `ca` is a file of certificates to trust for it, besides those of the system.
    """

    name: str
    url: str
    token: str = field(repr=False)
    source: str
    ca: str = ""

    @property
    def installed_here(self) -> bool:
        return self.name == INSTALLATION


INSTALLATION = "installation"


def resolve(
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    prefix: str | None = None,
    config: Path | None = None,
) -> Context:
    """The context in force, or NoServer. All arguments but the first are there for tests."""
    env = os.environ if env is None else env
    if name:
        return _book(config).get(name)
    found = (
        _from_variables(env, "NABLA_URL")
        or _from_variables(env, "NABLA_API_URL")
        or _from_installation(env, Path(prefix or sys.prefix))
        or _book(config).current()
    )
    if found is None:
        raise NoServer(
            "No Nabla server is known here.",
            "Start one with `nabla up`, or name one with `nabla login http://HOST:PORT`.",
        )
    return found


def _book(config: Path | None) -> ContextBook:
    """Opened only where it is needed: it lies in the home folder, which not every user has."""
    return ContextBook(config or paths.config_file())


def _from_variables(env: Mapping[str, str], variable: str) -> Context | None:
    url = env.get(variable)
    if not url:
        return None
    if not env.get("NABLA_TOKEN"):
        raise NoServer(f"{variable} is set but NABLA_TOKEN is not.", "Set both, or neither.")
    return Context("environment", front_door(url), env["NABLA_TOKEN"], f"{variable} and NABLA_TOKEN")


def _from_installation(env: Mapping[str, str], prefix: Path) -> Context | None:
    path = installation_file(env, prefix)
    if path is None or not path.is_file():
        return None
    data = jsonfile.read(path)
    url, token = data.get("url"), data.get("token")
    if not (isinstance(url, str) and isinstance(token, str)):
        raise BadConfig(f"{path} does not say url and token.", "Run `nabla up`, which writes it anew.")
    return Context(INSTALLATION, front_door(url), token, str(path))


def installation_file(env: Mapping[str, str], prefix: Path) -> Path | None:
    if env.get("NABLA_HOME"):
        return Path(env["NABLA_HOME"]) / "context.json"
    return prefix.parent / ".nabla" / "context.json" if prefix.name == ".venv" else None


class ContextBook:
    """The contexts that `nabla login` saved, in one file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[str, Context]:
        saved = self._read().get("contexts")
        entries = saved if isinstance(saved, dict) else {}
        return {name: self._context(name, entry) for name, entry in sorted(entries.items())}

    def current(self) -> Context | None:
        return self.all().get(self.current_name())

    def current_name(self) -> str:
        return str(self._read().get("current") or "")

    def get(self, name: str) -> Context:
        contexts = self.all()
        if name not in contexts:
            known = ", ".join(contexts) or "none"
            raise NoServer(f"There is no context {name!r}; known: {known}.", "Add one with `nabla login URL`.")
        return contexts[name]

    def save(self, name: str, url: str, token: str, ca: str = "") -> None:
        """Adds or replaces a context and makes it the current one."""
        contexts = {**self.all(), name: Context(name, front_door(url), token, str(self.path), ca)}
        self._write(contexts, name)

    def use(self, name: str) -> None:
        self.get(name)
        self._write(self.all(), name)

    def delete(self, name: str) -> None:
        self.get(name)
        contexts, current = self.all(), self.current_name()
        del contexts[name]
        self._write(contexts, "" if current == name else current)

    def _read(self) -> dict[str, object]:
        return jsonfile.read(self.path)

    def _write(self, contexts: Mapping[str, Context], current: str) -> None:
        entries = {
            name: {"url": c.url, "token": c.token, **({"ca": c.ca} if c.ca else {})} for name, c in contexts.items()
        }
        jsonfile.write(self.path, {"contexts": entries, "current": current})

    def _context(self, name: str, entry: object) -> Context:
        if not isinstance(entry, dict):
            raise BadConfig(f"The context {name!r} in {self.path} is damaged.", "Correct the file, or delete it.")
        return Context(name, str(entry.get("url")), str(entry.get("token")), str(self.path), str(entry.get("ca") or ""))
