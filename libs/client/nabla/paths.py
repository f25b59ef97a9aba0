"""Where this user's client keeps its settings and its cache, by the custom of each system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nabla.errors import BadConfig


class NoHome(BadConfig):
    """This user has no home folder, as in many containers: nothing can be remembered, and all else still works."""


def home() -> Path:
    """Raises NoHome."""
    try:
        return Path.home()
    except (RuntimeError, KeyError) as error:  # KeyError before Python 3.10
        raise NoHome(
            "You have no home folder: HOME is not set, and the system does not know this user.",
            "Set HOME, or NABLA_CONFIG to a file that may be written; NABLA_URL with NABLA_TOKEN need neither.",
        ) from error


def config_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or home() / "AppData" / "Roaming") / "nabla"
    if sys.platform == "darwin":
        return home() / "Library" / "Application Support" / "nabla"
    return Path(os.environ.get("XDG_CONFIG_HOME") or home() / ".config") / "nabla"


def config_file() -> Path:
    """`$NABLA_CONFIG`, or config.json in the user's configuration folder."""
    return Path(os.environ.get("NABLA_CONFIG") or config_dir() / "config.json")


def cache_dir() -> Path:
    """May be deleted at any time: what is in it is only quicker to have."""
    if os.environ.get("NABLA_CACHE"):
        return Path(os.environ["NABLA_CACHE"])
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local"
        return Path(local) / "nabla" / "Cache"
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "nabla"
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "nabla"
