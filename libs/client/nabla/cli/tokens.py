"""nabla tokens"""

from __future__ import annotations

import click

from nabla.cli.output import note, print_json, table
from nabla.cli.session import Group, Session, pass_session
from nabla.cli.values import span


@click.group(cls=Group)
def tokens() -> None:
    """Create and revoke API tokens."""


@tokens.command(example="nabla tokens create laptop --scope read --scope write --lifetime 30d")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["read", "write", "admin"]),
    help="All when left out.",
)
@click.option("--lifetime", type=span, default="90d", show_default=True, help="Until it expires.")
@pass_session
def create(session: Session, name: str, scopes: tuple[str, ...], lifetime: float) -> None:
    """Create a token. It is shown this once."""
    token = session.client().tokens.create(name, scopes, lifetime)
    if session.as_json:
        return print_json(token)
    click.echo(token.secret)
    note(f"Created token {token.id} ({name}). Keep it: it is not shown again.")


@tokens.command("list", example="nabla tokens list")
@pass_session
def list_tokens(session: Session) -> None:
    """List your tokens, without their secrets."""
    found = list(session.client().tokens.list())
    if session.as_json:
        return print_json(found)
    rows = [(t.id, t.name, t.scopes or "all", t.created_at, t.expires_at, t.revoked_at) for t in found]
    table(("ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "REVOKED"), rows, "No tokens.")


@tokens.command(example="nabla tokens revoke tk01jabc")
@click.argument("token_id")
@pass_session
def revoke(session: Session, token_id: str) -> None:
    """End a token at once."""
    token = session.client().tokens.revoke(token_id)
    if session.as_json:
        return print_json(token)
    note(f"Revoked {token_id}.")
