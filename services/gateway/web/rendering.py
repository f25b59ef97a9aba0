"""Templates, the words they use, and the policy under which browsers run our pages."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from libs.common.version import VERSION

FOLDER = Path(__file__).parent
NOTHING = "\N{EN DASH}"
TONES = {
    "good": {"succeeded", "ready", "active", "sealed"},
    "busy": {"running", "starting", "building", "deleting"},
    "wait": {"submitted", "waiting", "queued", "open", "silent"},
    "bad": {"failed", "timed_out", "unreachable", "gone"},
}


def render(template: str, status: int = 200, connect: str = "", **context: Any) -> HTMLResponse:
    """A page.

    Args:
        connect: a further origin that the page's scripts may call.
    """
    text = _environment().get_template(template).render(context)
    return HTMLResponse(text, status, {"Content-Security-Policy": content_policy(connect)})


def content_policy(connect: str = "") -> str:
    """Only our own files, no inline code, nobody's frame."""
    rules = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": f"'self' {connect}".strip(),
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"version": VERSION, "visitor": None}
    environment.filters |= {
        "tone": tone,
        "when": when,
        "size": size,
        "lasted": lasted,
        "figure": figure,
        "spoken": spoken_seconds,
        "quoted": shlex.quote,
    }
    return environment


def tone(state: str) -> str:
    """The colour of a state's dot."""
    return next((name for name, states in TONES.items() if state in states), "off")


def when(moment: datetime | None) -> str:
    """A time element; a script writes it in the reader's own zone."""
    if moment is None:
        return NOTHING
    utc = moment.astimezone(UTC)
    text = f"{utc:%d %b %H:%M} UTC"
    return Markup('<time datetime="{}">{}</time>').format(utc.isoformat(), text)


def size(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def lasted(began: datetime | None, ended: datetime | None) -> str:
    """How long something took; a script counts on while it has no end."""
    if began is None:
        return NOTHING
    if ended is None:
        return Markup('<time data-since="{}">…</time>').format(began.astimezone(UTC).isoformat())
    return spoken_seconds((ended - began).total_seconds())


def spoken_seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def figure(value: float) -> str:
    """A metric's value in a few digits."""
    return f"{value:.4g}"
