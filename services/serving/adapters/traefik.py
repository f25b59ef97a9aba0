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
        write_whole(self._file, text)
        deadline = time.monotonic() + self._timeout_s
        reason = "it still shows the configuration before"
        while time.monotonic() < deadline:
            try:
                answer = await self._client.get(f"/api/http/middlewares/{stamp}@file")
            except httpx.HTTPError as error:
                raise _behind(f"its API does not answer ({type(error).__name__})") from None
            if answer.status_code == httpx.codes.OK:
                return await self._check_routers(config)
            await asyncio.sleep(POLL_S)
        raise _behind(reason)

    async def close(self) -> None:
        await self._client.aclose()

    async def _check_routers(self, config: Config) -> None:
        """A router that Traefik refuses is left out of service without stopping the rest of the file."""
        answer = await self._client.get("/api/http/routers", params={"provider": "file", "per_page": 10_000})
        shown = {router["name"]: router for router in answer.json()}
        for name in config["http"]["routers"]:
            router = shown.get(f"{name}@file", {})
            if router.get("status") != "enabled":
                raise _behind(f"it does not accept the route {name}: {router.get('error', 'not shown')}")


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
