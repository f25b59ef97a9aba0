"""Secrets: set, listed and deleted by people, and revealed to the node that starts a job which names them."""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass, replace

from libs.common.contracts.envelope import Envelope
from libs.common.contracts.messages import (
    CheckSecrets,
    DeleteSecret,
    Execution,
    ListSecrets,
    Principal,
    RevealedSecret,
    RevealedSecrets,
    RevealSecrets,
    Secret,
    SecretPage,
    SetSecret,
)
from libs.common.errors import NotFound
from libs.common.ids import new_id
from libs.common.secret_refs import names_in
from libs.common.secret_transfer import Writer
from services.registry.domain import accounts as account_rules
from services.registry.domain import projects as project_rules
from services.registry.domain import secrets as rules
from services.registry.handlers.projects import visible_project
from services.registry.ports import Attempts, BrokenSeal, Jobs, Vault
from services.registry.store import RegistryUnit
from services.registry.store.secrets import Kept

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """What an attempt may see: the names that its job's template has."""

    execution: Execution
    named: frozenset[str]


class Secrets:
    """The handlers that must see values."""

    def __init__(self, vault: Vault, attempts: Attempts, jobs: Jobs) -> None:
        self._vault = vault
        self._attempts = attempts
        self._jobs = jobs

    async def set_secret(self, message: SetSecret, unit: RegistryUnit, call: Envelope) -> Secret:
        """A new secret, or the next version of one; the value that it has already changes nothing."""
        name, value = rules.checked_name(message.name), rules.checked_value(message.value).encode()
        principal, project_id = call.principal, await _open_project(unit, call.principal, message.project_id)
        known = await unit.secrets.named(name, principal.team_id, project_id)
        if known and self._is(known, value):
            return known.secret
        secret = _next(known, name, principal, project_id, unit)
        sealed = self._vault.seal(value, rules.binding(secret))
        if known:
            await unit.secrets.save(secret, sealed, known.revision)
        else:
            await unit.secrets.add(secret, sealed)
        return secret

    def _is(self, known: Kept, value: bytes) -> bool:
        """One that does not open any more is no reason to refuse the new value that mends it."""
        try:
            present = self._vault.open(known.sealed, rules.binding(known.secret))
        except BrokenSeal:
            return False
        return hmac.compare_digest(present, value)

    async def find_claim(self, message: RevealSecrets, _call: Envelope) -> Claim:
        """By its token and nothing else, since every node may name any principal.

        Raises:
            Unauthenticated: the token is not one of an attempt that lives.
        """
        execution = await self._attempts.of_token(account_rules.checked_hash(message.token_hash, "token_hash"))
        job = await self._jobs.get(execution.job_id, execution.team_id)
        if job is None:
            raise NotFound("job_not_found", f"There is no job {execution.job_id}.")
        return Claim(execution, names_in(job.template))

    async def reveal_secrets(self, message: RevealSecrets, unit: RegistryUnit, call: Envelope) -> RevealedSecrets:
        """The values, sealed for the key in the question: the answer passes where other nodes could listen."""
        claim = call.facts
        assert isinstance(claim, Claim)
        rules.check_named(message.names, claim.named)
        writer, execution = Writer(message.public_key), claim.execution
        found = await unit.secrets.seen_from(execution.project_id, execution.team_id, message.names)
        chosen = rules.effective((kept.secret for kept in found), rules.checked_names(message.names))
        by_id = {kept.secret.id: kept for kept in found}
        items = tuple(self._revealed(by_id[secret.id], writer) for secret in chosen.values())
        # Whoever asked said the executor's name; the attempt it asked for is what counts.
        attempt = Principal(kind="attempt", id=execution.attempt_id, team_id=execution.team_id)
        await unit.audit(replace(call, sender=attempt), message, execution.job_id, execution.team_id)
        return RevealedSecrets(items=items)

    def _revealed(self, kept: Kept, writer: Writer) -> RevealedSecret:
        secret = kept.secret
        try:
            value = self._vault.open(kept.sealed, rules.binding(secret))
        except BrokenSeal as error:
            log.error("a secret cannot be opened", extra={"secret": secret.id, "reason": str(error)})
            raise BrokenSeal(error.code, f"The secret {secret.name}: {error.detail}", error.remedy) from None
        return RevealedSecret(name=secret.name, version=secret.version, sealed=writer.seal(secret.name, value))


async def delete_secret(message: DeleteSecret, unit: RegistryUnit, call: Envelope) -> Secret:
    """Deletes a secret. Jobs that have started keep their value; those that start later are refused."""
    project_id = await _project_id(unit, call.principal, message.project_id)
    known = await unit.secrets.named(message.name, call.principal.team_id, project_id)
    if known is None:
        where = "project" if project_id else "team"
        detail = f"There is no secret {message.name[:100]} of this {where}."
        raise NotFound("secret_not_found", detail, "See `nabla secrets list`.")
    await unit.secrets.remove(known.secret.id)
    return known.secret


async def list_secrets(message: ListSecrets, unit: RegistryUnit, call: Envelope) -> SecretPage:
    """What there is, never what it says; newest first."""
    project_id = await _project_id(unit, call.principal, message.project_id)
    return await unit.secrets.page(call.principal.team_id, project_id, message.cursor, message.limit)


async def check_secrets(message: CheckSecrets, unit: RegistryUnit, call: Envelope) -> SecretPage:
    """Before a job is submitted: it would only be refused at its start."""
    names = rules.checked_names(message.names)
    project_id = await _project_id(unit, call.principal, message.project_id)
    found = await unit.secrets.seen_from(project_id, call.principal.team_id, names)
    return SecretPage(items=tuple(rules.effective((kept.secret for kept in found), names).values()))


async def _project_id(unit: RegistryUnit, principal: Principal, id_or_name: str) -> str:
    """Empty stays empty: the team's own secrets."""
    return (await visible_project(unit, principal, id_or_name)).id if id_or_name else ""


async def _open_project(unit: RegistryUnit, principal: Principal, id_or_name: str) -> str:
    if not id_or_name:
        return ""
    project = await visible_project(unit, principal, id_or_name)
    project_rules.state_after(project, "update")
    return project.id


def _next(known: Kept | None, name: str, principal: Principal, project_id: str, unit: RegistryUnit) -> Secret:
    if known:
        update = {"version": known.secret.version + 1, "updated_by": principal.id, "updated_at": unit.now}
        return known.secret.model_copy(update=update)
    return Secret(
        id=new_id("secret"),
        team_id=principal.team_id,
        project_id=project_id,
        name=name,
        version=1,
        created_by=principal.id,
        created_at=unit.now,
        updated_by=principal.id,
        updated_at=unit.now,
    )
