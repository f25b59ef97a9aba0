"""Nabla from Python: inside a job, and against a server from anywhere.

Importing this package loads nothing but itself: each name below is fetched from its own module when it is first
used. The names for use inside a job need only the standard library and Python 3.8.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nabla.client import Client as Client
    from nabla.errors import ApiError as ApiError
    from nabla.errors import Conflict as Conflict
    from nabla.errors import Forbidden as Forbidden
    from nabla.errors import Invalid as Invalid
    from nabla.errors import NablaError as NablaError
    from nabla.errors import NotFound as NotFound
    from nabla.errors import NotInJob as NotInJob
    from nabla.errors import Unauthenticated as Unauthenticated
    from nabla.errors import Unavailable as Unavailable
    from nabla.errors import Unreachable as Unreachable
    from nabla.job import artifacts as artifacts
    from nabla.job import flush as flush
    from nabla.job import log as log
    from nabla.job import log_params as log_params
    from nabla.job import save_model as save_model
    from nabla.job import storage as storage
    from nabla.job import workspace as workspace
    from nabla.manifest import Manifest as Manifest

_JOB = ("artifacts", "flush", "log", "log_params", "save_model", "storage", "workspace")
_ERRORS = (
    "ApiError",
    "Conflict",
    "Forbidden",
    "Invalid",
    "NablaError",
    "NotFound",
    "NotInJob",
    "Unauthenticated",
    "Unavailable",
    "Unreachable",
)
_HOMES = {
    "Client": "nabla.client",
    "Manifest": "nabla.manifest",
    **dict.fromkeys(_JOB, "nabla.job"),
    **dict.fromkeys(_ERRORS, "nabla.errors"),
}

__all__ = [  # noqa: PLE0604
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'nabla' has no attribute {name!r}")
    from importlib import import_module

    try:
        value: object = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nabla"):
            raise
        raise ImportError(f"nabla.{name} needs the package {error.name!r}: run `pip install nabla`.") from error
    globals()[name] = value
    return value
