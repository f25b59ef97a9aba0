"""Tables for people, JSON for programs. Standard output carries the answer and standard error all other words."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

STATE_STYLES = {
    "running": "cyan", "starting": "cyan", "building": "cyan", "succeeded": "green", "ready": "green",
    "active": "green", "failed": "red", "timed_out": "red", "unreachable": "yellow", "waiting": "yellow",
    "silent": "yellow", "resting": "dim", "gone": "red", "cancelled": "dim", "archived": "dim", "deleted": "dim",
}  # fmt: skip
_LIBRARY = re.compile(r"(?:<urllib3|HTTPS?Connection(?:Pool)?\(|\(?['\"]?Connection aborted).*")
_REASON = re.compile(
    r"\[Errno -?\d+\] ([\w ]+)|([Rr]ead timed out|timed out)|(too many \d+ error responses)|(Remote end closed)"
)
# A name from elsewhere must not move the cursor or colour the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A pipe has no width: nothing in it is cut or wrapped.
PIPE_WIDTH = 10_000
# Of what was left out.
LISTED = 10


def print_json(value: object) -> None:
    from nabla.decoding import as_json

    click.echo(json.dumps(as_json(value), indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """A word to the person at the terminal."""
    click.echo(text, err=True)


def tell_left_out(names: Sequence[str], why: str) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        note(f"{why}: {', '.join(names[:LISTED])}{more}")


def one_line(text: str) -> str:
    """A reason as one line, without the insides of the HTTP library that a server met the reason with."""
    text = " ".join(text.split())
    raw = _LIBRARY.search(text)
    if raw is None:
        return text
    said = _REASON.search(raw.group())
    reason = next(filter(None, said.groups())) if said else "it does not answer"
    return f"{text[: raw.start()]}{reason}{'.' if text.endswith('.') else ''}"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """`empty` is said on standard error when there is nothing to show: what to do to change that."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        shown.add_column(heading, overflow="fold", no_wrap=heading in ("ID", "STATE"))
    for row in rows:
        shown.add_row(*(Text(cell(value), style=STATE_STYLES.get(str(value), "")) for value in row))
    if shown.row_count:
        console().print(shown)
    else:
        note(empty)


def details(pairs: Iterable[tuple[str, object]]) -> None:
    """One object: its facts under each other, without the empty ones."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, show_header=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, "", (), {}):
            shown.add_row(name, Text(cell(value), style=STATE_STYLES.get(str(value), "")))
    console().print(shown)


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return ago(value, datetime.now(timezone.utc))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))


def ago(moment: datetime, now: datetime) -> str:
    """How long ago, roughly; in the future, "in ..."."""
    seconds = (now - moment).total_seconds()
    text = span(abs(seconds))
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
