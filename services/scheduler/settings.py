"""The scheduler's settings."""

from __future__ import annotations

from pathlib import Path

from libs.common.settings import Settings


class SchedulerSettings(Settings):
    """What the scheduler needs to know beyond every service's settings."""

    # Machine types, a TOML table each, in `home` unless absolute; without the file they are taken from the nodes.
    machines_file: Path = Path("machines.toml")
    # Seconds without a word from an executor until its jobs show as unreachable.
    executor_silent_s: float = 30.0
    # Seconds without news of an attempt until the executor is asked about it.
    attempt_check_s: float = 15.0
    # Seconds without news of a project until the registry is asked whether jobs may still run in it.
    project_check_s: float = 60.0
