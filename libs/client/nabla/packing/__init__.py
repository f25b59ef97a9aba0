"""A folder becomes a workspace: walked, filtered, hashed with a cache, packed the same way every time, uploaded
only when the server does not have it."""

from nabla.packing.workspace import Workspace, pack

__all__ = ["Workspace", "pack"]
