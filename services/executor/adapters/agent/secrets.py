"""The values of the secrets that an attempt's job names: asked of the registry at its start, and kept in memory alone.

What is on the node's disk (order.json, spec.json) names secrets and holds none. The values go to the shim through a
descriptor of memory, so that there is no file to delete, and whoever begins again asks again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from libs.common import secret_refs
from libs.common.contracts.messages import JobTemplate, RevealedSecrets, RevealSecrets
from libs.common.errors import Refusal, Unavailable
from libs.common.ids import secret_hash
from libs.common.secret_transfer import NotForUs, Reader
from services.executor.adapters.agent.agent_bus import AgentBus, patiently_ask
from services.executor.adapters.attempts.masking import Masker
from services.executor.domain.beginnings import NotStarted
from services.executor.ports import StartOrder

PATIENCE_S = 120.0
# So that an answer of the longest values stays beneath what any bus carries.
NAMES_A_QUESTION = 8


class SecretsRefused(NotStarted):
    """The job cannot have what it names; the text says which and why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Revealed:
    """What an order's references stand for.

    Args:
        template: with the credentials of container and source in plain text, for memory alone. Its variables still
            name their secrets, so that a spec can be made of it: the shim puts the values in.
        values: by the secret's name.
    """

    template: JobTemplate = field(repr=False)
    values: Mapping[str, str] = field(repr=False)

    def masker(self) -> Masker:
        return Masker(self.values.values())

    def for_shim(self) -> bytes:
        """What is handed to the shim; empty when there is nothing."""
        return json.dumps(dict(self.values)).encode() if self.values else b""


class Secrets:
    """Asks for the values of an order."""

    def __init__(self, bus: AgentBus) -> None:
        self._bus = bus

    async def reveal(self, order: StartOrder) -> Revealed:
        """All that the order's template names; asks nobody when that is nothing.

        Raises:
            SecretsRefused.
        """
        names = sorted(secret_refs.names_in(order.template))
        values: dict[str, str] = {}
        for start in range(0, len(names), NAMES_A_QUESTION):
            values |= await self._ask(order, tuple(names[start : start + NAMES_A_QUESTION]))
        return Revealed(secret_refs.with_credentials(order.template, values), values)

    async def _ask(self, order: StartOrder, names: tuple[str, ...]) -> dict[str, str]:
        reader = Reader()
        asked = RevealSecrets(token_hash=secret_hash(order.token), names=names, public_key=reader.public_key)
        try:
            answer = await patiently_ask(self._bus, asked, RevealedSecrets, order.team_id, patience_s=PATIENCE_S)
            values = {item.name: reader.open(item.name, item.sealed) for item in answer.items}
        except Refusal as error:
            said = " ".join(filter(None, (error.detail, error.remedy)))
            raise SecretsRefused(said, may_pass=isinstance(error, Unavailable)) from error
        except NotForUs as error:
            raise SecretsRefused(f"{error}.") from error
        missing = [name for name in names if name not in values]
        if missing:
            raise SecretsRefused(f"The registry did not answer for the secret {missing[0]}.")
        return values
