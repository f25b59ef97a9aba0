"""Health of a replica, over HTTP."""

from __future__ import annotations

import os
import ssl

import httpx

from services.serving.domain.front import Backend, Pass


class HttpHealth:
    """Asks BentoML's own readiness page, on other machines by TLS as the front door does."""

    def __init__(self) -> None:
        self._clients: dict[Pass | None, httpx.AsyncClient] = {}

    async def ready(self, backend: Backend, shown: Pass | None) -> bool:
        named = {"sni_hostname": backend.name} if backend.name else {}
        try:
            answer = await self._client(shown if backend.name else None).get(f"{backend.url}/readyz", extensions=named)
        except (httpx.HTTPError, OSError):  # TLS that is refused after the handshake is no error of httpx's
            return False
        return answer.status_code == httpx.codes.OK

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    def _client(self, shown: Pass | None) -> httpx.AsyncClient:
        if shown not in self._clients:
            # A connection belongs to one name; kept, it would be used for another one at the same address.
            limits = httpx.Limits(max_keepalive_connections=0) if shown else httpx.Limits()
            verify = tls_context(shown) if shown else False
            self._clients[shown] = httpx.AsyncClient(timeout=2.0, trust_env=False, verify=verify, limits=limits)
        return self._clients[shown]


def tls_context(shown: Pass) -> ssl.SSLContext:
    """That of a client that shows this pass, and believes its authority alone."""
    context = ssl.create_default_context(cadata=shown.authority)
    descriptor = os.memfd_create("pass")  # Python reads keys from files alone
    with os.fdopen(descriptor, "w") as file:
        file.write(shown.key + shown.certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    return context
