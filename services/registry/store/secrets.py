"""Secrets in the database: only ever sealed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from libs.common.clock import from_us, to_us
from libs.common.contracts.messages import Secret, SecretPage
from services.registry.ports import Sealed
from services.registry.store.tables import SecretRow
from services.registry.store.unit import CatalogueUnit, table_of

SECRETS = table_of(SecretRow)


@dataclass(frozen=True, slots=True)
class Kept:
    """A secret with its sealed value, at a revision."""

    secret: Secret
    sealed: Sealed
    revision: int


class Secrets:
    """The repository of secrets, within one unit of work."""

    def __init__(self, unit: CatalogueUnit) -> None:
        self._unit = unit

    async def add(self, secret: Secret, sealed: Sealed) -> None:
        values = _values(secret, sealed) | {"id": secret.id, "revision": 1}
        await self._unit.insert(SecretRow, values)

    async def save(self, secret: Secret, sealed: Sealed, revision: int) -> None:
        """Raises StaleRevision unless the row is still at `revision`."""
        await self._unit.swap(SecretRow, secret.id, revision, _values(secret, sealed))

    async def named(self, name: str, team_id: str, project_id: str) -> Kept | None:
        """The project's own, or the team's when no project is given."""
        owner_id = project_id or team_id
        mine = (SECRETS.c.owner_id == owner_id, SECRETS.c.team_id == team_id, SECRETS.c.name == name)
        row = await self._unit.one(select(SECRETS).where(*mine))
        return _kept(row) if row else None

    async def seen_from(self, project_id: str, team_id: str, names: Iterable[str]) -> list[Kept]:
        """By these names, both the project's and the team's."""
        owners = [team_id, *filter(None, [project_id])]
        query = select(SECRETS).where(
            SECRETS.c.team_id == team_id, SECRETS.c.owner_id.in_(owners), SECRETS.c.name.in_(list(names))
        )
        return [_kept(row) for row in await self._unit.execute(query)]

    async def page(self, team_id: str, project_id: str, cursor: str, limit: int) -> SecretPage:
        owners = [team_id, *filter(None, [project_id])]
        query = select(SECRETS).where(SECRETS.c.team_id == team_id, SECRETS.c.owner_id.in_(owners))
        page = await self._unit.page(query, SECRETS.c.id, cursor, limit)
        return SecretPage(items=tuple(map(_secret, page.rows)), next_cursor=page.next_cursor)

    async def remove(self, secret_id: str) -> None:
        await self._unit.execute(SECRETS.delete().where(SECRETS.c.id == secret_id))

    async def remove_of(self, project_id: str) -> None:
        await self._unit.execute(SECRETS.delete().where(SECRETS.c.project_id == project_id))

    async def move(self, project_id: str, team_id: str) -> None:
        """Takes the secrets of a project along; a save that read them before is stale then."""
        moved = SECRETS.update().where(SECRETS.c.project_id == project_id)
        await self._unit.execute(moved.values(team_id=team_id, revision=SECRETS.c.revision + 1))

    async def wrapped_otherwise(self, key_id: str, known: Sequence[str], limit: int) -> list[Kept]:
        """Those under another of the known keys than this one."""
        query = select(SECRETS).where(SECRETS.c.key_id != key_id, SECRETS.c.key_id.in_(known))
        return [_kept(row) for row in await self._unit.execute(query.order_by(SECRETS.c.id).limit(limit))]

    async def lost(self, known: Sequence[str]) -> int:
        """How many are under a key that this installation does not have."""
        query = select(func.count()).select_from(SECRETS).where(SECRETS.c.key_id.not_in(known))
        return int((await self._unit.execute(query)).scalar_one())


def _values(secret: Secret, sealed: Sealed) -> dict[str, Any]:
    assert secret.created_at
    assert secret.updated_at
    return {
        "owner_id": secret.project_id or secret.team_id,
        "team_id": secret.team_id,
        "project_id": secret.project_id or None,
        "name": secret.name,
        "version": secret.version,
        "sealed": sealed.ciphertext,
        "wrapped_key": sealed.wrapped_key,
        "key_id": sealed.key_id,
        "created_by": secret.created_by,
        "created_us": to_us(secret.created_at),
        "updated_by": secret.updated_by,
        "updated_us": to_us(secret.updated_at),
    }


def _kept(row: Any) -> Kept:
    sealed = Sealed(ciphertext=row.sealed, wrapped_key=row.wrapped_key, key_id=row.key_id)
    return Kept(_secret(row), sealed, row.revision)


def _secret(row: Any) -> Secret:
    return Secret(
        id=row.id,
        team_id=row.team_id,
        project_id=row.project_id or "",
        name=row.name,
        version=row.version,
        created_by=row.created_by,
        created_at=from_us(row.created_us),
        updated_by=row.updated_by,
        updated_at=from_us(row.updated_us),
    )
