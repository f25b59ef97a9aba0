"""nabla login, logout, whoami, open"""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import click

from nabla import contexts, paths
from nabla.address import front_door
from nabla.cli.output import details, note, print_json
from nabla.cli.session import Command, Session, pass_session
from nabla.contexts import ContextBook


@click.command(cls=Command, example="nabla login http://127.0.0.1:7000")
@click.argument("url")
@click.option("--token", help="An API token; asked for when left out, and better not on a shared command line.")
@click.option("--name", help="What to call it; the server's host and port when left out.")
@click.option(
    "--ca",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="Certificates to trust for this server (PEM), where its own are signed by nobody the system knows.",
)
@pass_session
def login(session: Session, url: str, token: str | None, name: str | None, ca: str | None) -> None:
    """Save a server and a token for it, and use it from now on.

    Everything goes through one port: for a server elsewhere, `ssh -L 7000:127.0.0.1:7000 HOST` is enough.
    """
    from nabla.client import Client

    url = _checked(url)
    token = token or _asked()
    with Client(url, token, patience_s=5.0, ca=ca or "") as client:
        principal = client.whoami()
    name = name or urlsplit(url).netloc
    book = ContextBook(paths.config_file())
    book.save(name, url, token, ca or "")
    if session.as_json:
        return print_json({"context": name, "url": url, "principal": principal})
    note(f"Signed in to {url} as {principal.name or principal.id}; saved as context {name!r} in {book.path}.")
    _warn_when_overruled(name)


@click.command(cls=Command, example="nabla logout")
@click.argument("name", required=False)
@pass_session
def logout(session: Session, name: str | None) -> None:
    """Forget a saved server and its token; the current one when no name is given.

    The token itself stays valid until it expires: `nabla tokens revoke` ends it.
    """
    book = ContextBook(paths.config_file())
    name = name or session.context_name or book.current_name()
    if not name:
        raise click.UsageError("There is no current context; name one. `nabla contexts list` shows them.")
    book.delete(name)
    if session.as_json:
        return print_json({"context": name, "deleted": True})
    note(f"Forgot {name!r}.")


@click.command(cls=Command, example="nabla whoami")
@pass_session
def whoami(session: Session) -> None:
    """Show who you are to which server, and where that is written."""
    client = session.client(5.0)
    principal, context = client.whoami(), client.context
    if session.as_json:
        return print_json({"url": context.url, "source": context.source, "principal": principal})
    details(
        [
            ("server", context.url),
            ("from", context.source),
            ("name", principal.name or principal.id),
            ("kind", principal.kind),
            ("team", principal.team_id),
            ("role", principal.role),
            ("scopes", principal.scopes or "all"),
        ]
    )


@click.command("open", cls=Command, example="nabla open")
@click.option("--browser", is_flag=True, help="Open it in the default browser, too.")
@pass_session
def open_link(session: Session, browser: bool) -> None:
    """Print a link that signs one browser in to the web interface, once."""
    link = session.client().sign_in_link()
    if session.as_json:
        print_json(link)
    else:
        click.echo(link.url)
        note("It works once, within ten minutes.")
    if browser:
        import webbrowser

        webbrowser.open(link.url)


def _checked(url: str) -> str:
    from nabla.http import BrokenConnection, split_address

    url = url if "://" in url else f"http://{url}"
    try:
        split_address(url)
    except BrokenConnection as error:
        raise click.BadParameter(f"{error}; write it like http://HOST:PORT.", param_hint="URL") from error
    return front_door(url)


def _asked() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Token", hide_input=True, err=True))
    token = sys.stdin.readline().strip()
    if not token:
        raise click.UsageError("No token: give --token, or write it to standard input.")
    return token


def _warn_when_overruled(name: str) -> None:
    used = contexts.resolve()
    if used.name != name:
        note(f"Here {used.source} comes first ({used.url}): add --context {name} to use the new one.")
