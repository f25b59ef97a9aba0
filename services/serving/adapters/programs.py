"""The texts of the programs that run inside build and replica jobs."""

from __future__ import annotations

from pathlib import Path

from services.serving.domain.templates import Programs

RUNTIME = Path(__file__).resolve().parents[1] / "runtime"


def programs() -> Programs:
    return Programs(**{name: (RUNTIME / f"{name}.py").read_text() for name in ("build", "replica", "endpoint")})
