"""The unit of work over accounts, projects, models and secrets."""

from __future__ import annotations

from datetime import datetime

from sqlmodel.ext.asyncio.session import AsyncSession

from libs.common.store import Skeleton
from services.registry.store.accounts import Accounts
from services.registry.store.models import Models
from services.registry.store.projects import Projects
from services.registry.store.secrets import Secrets
from services.registry.store.tables import AUDIT
from services.registry.store.unit import CatalogueUnit


class RegistryUnit(CatalogueUnit):
    """One transaction of the registry's first database."""

    audit_rows = AUDIT

    def __init__(self, session: AsyncSession, skeleton: Skeleton, source: str, now: datetime) -> None:
        super().__init__(session, skeleton, source, now)
        self.accounts = Accounts(self)
        self.projects = Projects(self)
        self.models = Models(self)
        self.secrets = Secrets(self)
