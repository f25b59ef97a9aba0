"""The tables of accounts, projects and models. Runs have a database of their own, with tables of their own."""

from __future__ import annotations

from sqlalchemy import BigInteger, Index, LargeBinary, String, text
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

from libs.common.store import Skeleton
from services.registry.store.unit import audit_table


class Base(SQLModel, registry=registry()):
    """The registry's own metadata."""


class UserRow(Base, table=True):
    __tablename__ = "users"

    id: str = Field(primary_key=True, max_length=40)
    name: str = Field(max_length=100, unique=True)
    created_us: int = Field(sa_type=BigInteger)


class TeamRow(Base, table=True):
    __tablename__ = "teams"

    id: str = Field(primary_key=True, max_length=40)
    name: str = Field(max_length=100, unique=True)
    created_us: int = Field(sa_type=BigInteger)


class MembershipRow(Base, table=True):
    __tablename__ = "memberships"

    user_id: str = Field(primary_key=True, foreign_key="users.id", max_length=40)
    team_id: str = Field(primary_key=True, foreign_key="teams.id", max_length=40)
    # owner admin member viewer
    role: str = Field(max_length=10)
    created_us: int = Field(sa_type=BigInteger)


class TokenRow(Base, table=True):
    __tablename__ = "tokens"
    __table_args__ = (Index("tokens_of_team", "team_id", "id"),)

    id: str = Field(primary_key=True, max_length=40)
    token_hash: str = Field(unique=True, max_length=64)
    name: str = Field(max_length=100)
    user_id: str = Field(foreign_key="users.id", max_length=40)
    team_id: str = Field(foreign_key="teams.id", max_length=40)
    # Separated by spaces; empty means all.
    scopes: str = Field(max_length=40)
    created_us: int = Field(sa_type=BigInteger)
    expires_us: int = Field(sa_type=BigInteger)
    revoked_us: int | None = Field(default=None, sa_type=BigInteger)


class SignInRow(Base, table=True):
    __tablename__ = "sign_ins"

    id: str = Field(primary_key=True, max_length=40)
    code_hash: str = Field(unique=True, max_length=64)
    user_id: str = Field(foreign_key="users.id", max_length=40)
    team_id: str = Field(foreign_key="teams.id", max_length=40)
    scopes: str = Field(max_length=40)
    expires_us: int = Field(sa_type=BigInteger)
    spent_us: int | None = Field(default=None, sa_type=BigInteger)


class ProjectRow(Base, table=True):
    __tablename__ = "projects"
    __table_args__ = (
        Index(
            "project_name_in_team",
            "team_id",
            "name",
            unique=True,
            sqlite_where=text("state != 'deleted'"),
            postgresql_where=text("state != 'deleted'"),
        ),
        Index("projects_of_team", "team_id", "id"),
        Index("projects_by_state", "state", "updated_us"),
    )

    id: str = Field(primary_key=True, max_length=40)
    team_id: str = Field(foreign_key="teams.id", max_length=40)
    name: str = Field(max_length=100)
    description: str = Field(max_length=5000)
    # active archived deleted
    state: str = Field(max_length=10)
    created_by: str = Field(max_length=40)
    created_us: int = Field(sa_type=BigInteger)
    updated_us: int = Field(sa_type=BigInteger)
    revision: int = Field(sa_type=BigInteger)


class ModelRow(Base, table=True):
    __tablename__ = "models"
    __table_args__ = (
        Index("model_name_in_project", "project_id", "name", unique=True),
        Index("models_of_team", "team_id", "id"),
    )

    id: str = Field(primary_key=True, max_length=40)
    team_id: str = Field(foreign_key="teams.id", max_length=40)
    project_id: str = Field(foreign_key="projects.id", max_length=40)
    name: str = Field(max_length=100)
    description: str = Field(max_length=5000)
    latest_version: int
    created_us: int = Field(sa_type=BigInteger)
    revision: int = Field(sa_type=BigInteger)


class ModelVersionRow(Base, table=True):
    __tablename__ = "model_versions"
    __table_args__ = (
        Index("version_of_model", "model_id", "version", unique=True),
        Index("fileset_of_model", "model_id", "fileset_id", unique=True),
    )

    id: str = Field(primary_key=True, max_length=40)
    model_id: str = Field(foreign_key="models.id", max_length=40)
    version: int
    framework: str = Field(max_length=20)
    description: str = Field(max_length=5000)
    fileset_id: str = Field(max_length=40)
    size_bytes: int = Field(sa_type=BigInteger)
    digest: str = Field(max_length=200)
    job_id: str = Field(max_length=40)
    # Name -> value, as JSON.
    metrics: str = Field(sa_type=String)
    created_by: str = Field(max_length=40)
    created_us: int = Field(sa_type=BigInteger)


class SecretRow(Base, table=True):
    """The value is in `sealed`, under a key of its own, which is in `wrapped_key` under the installation's.

    `owner_id` is the project's id, or the team's for its own: what makes a name unique.
    """

    __tablename__ = "secrets"
    __table_args__ = (
        Index("secret_name_of_owner", "owner_id", "name", unique=True),
        Index("secrets_of_team", "team_id", "id"),
        Index("secrets_by_key", "key_id", "id"),
    )

    id: str = Field(primary_key=True, max_length=40)
    owner_id: str = Field(max_length=40)
    team_id: str = Field(foreign_key="teams.id", max_length=40)
    project_id: str | None = Field(default=None, foreign_key="projects.id", max_length=40)
    name: str = Field(max_length=100)
    version: int
    sealed: bytes = Field(sa_type=LargeBinary)
    wrapped_key: bytes = Field(sa_type=LargeBinary)
    # Which of the installation's keys has wrapped it.
    key_id: str = Field(max_length=16)
    created_by: str = Field(max_length=40)
    created_us: int = Field(sa_type=BigInteger)
    updated_by: str = Field(max_length=40)
    updated_us: int = Field(sa_type=BigInteger)
    revision: int = Field(sa_type=BigInteger)


AUDIT = audit_table(Base.metadata)
SKELETON = Skeleton(Base.metadata)
