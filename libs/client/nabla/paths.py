"""Where this user's client keeps its settings and its cache, by the custom of each system."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def config_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "nabla"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "nabla"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nabla"


def config_file() -> Path:
    """`$NABLA_CONFIG`, or config.json in the user's configuration folder."""
    return Path(os.environ.get("NABLA_CONFIG") or config_dir() / "config.json")


def cache_dir() -> Path:
    """May be deleted at any time: what is in it is only quicker to have."""
    if os.environ.get("NABLA_CACHE"):
        return Path(os.environ["NABLA_CACHE"])
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "nabla" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nabla"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla"
