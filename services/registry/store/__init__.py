"""State: `tables` and the repositories over them; `runs` is a second database with its own unit of work."""

from services.registry.store.registry import RegistryUnit
from services.registry.store.tables import SKELETON, Base

__all__ = ["SKELETON", "Base", "RegistryUnit"]
