"""Why a job does not start, in two kinds: what would be refused again, and what may pass by itself."""

from __future__ import annotations

import errno
import re

from libs.common.errors import NablaError

# As engines, installers, git and S3 servers say that somebody does not answer, or not now.
_PASSING = re.compile(
    r"connection (?:refused|reset|aborted|closed|timed out|broken by)|couldn'?t connect|could not connect"
    r"|failed to connect|unable to connect|broken pipe|unexpected (?:eof|disconnect)|early eof|remote end hung up"
    r"|timed out|(?:i/o|request|read|connect|handshake) ?timeout|deadline exceeded|too slow|temporary failure"
    r"|temporarily unavailable"
    r"|no such host|could not resolve host|name or service not known|failed to resolve|failed to lookup"
    r"|network is unreachable|no route to host|error sending request|tls handshake|proxy does not connect"
    r"|does not answer|is not known here|was not there within|watched over it was killed"
    r"|toomanyrequests|too many requests|slowdown|internalerror|service ?unavailable|bad gateway|gateway timeout"
    r"|internal server error|(?:status|error|code|http|failed)\D{0,30}\b(?:429|5\d\d)\b|\b50[0234] (?:server|internal)",
    re.IGNORECASE,
)
_OF_THE_JOBS_OWN_FILES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


class NotStarted(NablaError):
    """A job cannot be started; the text says why, for the user to read.

    Args:
        may_pass: the same order may well start another time: somebody did not answer, or the node could not.
    """

    def __init__(self, detail: str, *, may_pass: bool = False) -> None:
        super().__init__(detail)
        self.may_pass = may_pass


def sounds_passing(said: str) -> bool:
    """Whether a program's last words are of a network or a server that may answer the next time."""
    return _PASSING.search(said) is not None


def may_pass(error: Exception) -> bool:
    """Of what kept a job from starting. What is not about the job is about its node, and may pass."""
    if isinstance(error, ValueError):  # a malformed order stays one
        return False
    if isinstance(error, OSError):
        return error.errno not in _OF_THE_JOBS_OWN_FILES
    return getattr(error, "may_pass", True)
