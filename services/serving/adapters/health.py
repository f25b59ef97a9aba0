"""Health of a replica, over HTTP."""

from __future__ import annotations

import httpx


class HttpHealth:
    """Asks BentoML's own readiness page."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=2.0, trust_env=False)

    async def ready(self, address: str) -> bool:
        try:
            answer = await self._client.get(f"http://{address}/readyz")
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    async def close(self) -> None:
        await self._client.aclose()
