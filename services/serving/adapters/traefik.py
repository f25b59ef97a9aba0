"""Traefik's file provider: the configuration is one file, written whole, and seen live through Traefik's API."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx

from libs.common.errors import Unavailable
from services.serving.domain.front import Config, stamped

# Traefik reads YAML and TOML; JSON is YAML.
FILE_NAME = "nabla.yml"
POLL_S = 0.02


class TraefikFiles:
    """The proxy as a folder that Traefik watches, and an API that shows what it made of it."""

    def __init__(self, folder: Path, api: str, *, timeout_s: float = 5.0) -> None:
        self._file = folder / FILE_NAME
        self._client = httpx.AsyncClient(base_url=api, timeout=2.0, trust_env=False)
        self._timeout_s = timeout_s

    async def publish(self, config: Config) -> None:
        text, stamp = stamped(config)
        try:
            write_whole(self._file, text)
        except OSError as error:
            raise _behind(f"they cannot be written to {self._file} ({error.strerror})") from None
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if (await self._ask(f"middlewares/{stamp}@file")).status_code == httpx.codes.OK:
                return await self._check_routers(config)
            await asyncio.sleep(POLL_S)
        raise _behind("it still shows the configuration before")

    async def close(self) -> None:
        await self._client.aclose()

    async def _check_routers(self, config: Config) -> None:
        """A router that Traefik refuses is left out of service without stopping the rest of the file."""
        answer = await self._ask("routers?provider=file&per_page=10000")
        if answer.status_code != httpx.codes.OK:
            raise _behind(f"its API answers {answer.status_code}")
        shown = {router["name"]: router for router in answer.json()}
        for name in config["http"]["routers"]:
            router = shown.get(f"{name}@file", {})
            if router.get("status") != "enabled":
                raise _behind(f"it does not accept the route {name}: {router.get('error', 'not shown')}")

    async def _ask(self, what: str) -> httpx.Response:
        try:
            return await self._client.get(f"/api/http/{what}")
        except httpx.HTTPError as error:
            raise _behind(f"its API does not answer ({type(error).__name__})") from None


def write_whole(file: Path, text: str) -> bool:
    """Replaces the file in one step, through a folder that nobody watches; False when it is the same already."""
    try:
        if file.read_text() == text:
            return False
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.parent.parent / f".{file.name}.{os.getpid()}"
    draft.write_text(text)
    draft.replace(file)
    return True


def _behind(reason: str) -> Unavailable:
    return Unavailable("proxy_behind", f"Traefik does not show the new routes: {reason}.", "See `nabla status`.")
