"""An executor without its bus, for every test of this folder."""

from __future__ import annotations

from tests.unit.executor.test_executor import bench

__all__ = ["bench"]
