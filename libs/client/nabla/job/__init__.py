"""For use inside a job: metrics, parameters, models and the job's three folders.

Standard library only, Python 3.8 and newer: this runs in whatever environment a user's job brings.
"""

from nabla.job.identity import artifacts, storage, workspace
from nabla.job.metrics import flush, log, log_params
from nabla.job.models import save_model

__all__ = ["artifacts", "flush", "log", "log_params", "save_model", "storage", "workspace"]
