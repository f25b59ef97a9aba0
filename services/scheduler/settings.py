"""The scheduler's settings."""

from __future__ import annotations

from libs.common.settings import Settings


class SchedulerSettings(Settings):
    """What the scheduler needs to know beyond every service's settings."""

    # Seconds without a word from an executor until its jobs show as unreachable.
    executor_silent_s: float = 30.0
    # Seconds without news of an attempt until the executor is asked about it.
    attempt_check_s: float = 15.0
    # Seconds without news of a project until the registry is asked whether jobs may still run in it.
    project_check_s: float = 60.0
