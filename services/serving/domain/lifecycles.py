"""The states of a deployment and of its revisions: the only place where their moves are written down.

deployment
| from     | to       | driven by     | when                                                      |
|----------|----------|---------------|-----------------------------------------------------------|
| building | starting | bento_built   | the build job succeeded and its artifacts hold a bento     |
| building | failed   | gave_up       | the build job ended otherwise, or takes too long           |
| starting | ready    | replica_ready | the replica answers and Traefik shows the route to it      |
| starting | starting | replica_ended | the replica job ended: another one follows after a pause   |
| starting | failed   | gave_up       | five quick deaths, or a first start that takes too long    |
| ready    | starting | replica_ended | the replica job ended, or runs elsewhere now               |
| ready    | failed   | gave_up       | the fifth quick death in a row                             |
| building starting ready failed | deleting | delete  | a person asked                          |
| deleting | deleted  | cleared       | Traefik shows no route any more and every job has ended    |

revision: as its deployment, and `retired` when that is deleted.
"""

from __future__ import annotations

from typing import Literal

from libs.common.transitions import TransitionTable

Trigger = Literal["bento_built", "replica_ready", "replica_ended", "gave_up", "delete", "cleared"]

DEPLOYMENT = TransitionTable(
    "deployment",
    {
        ("building", "bento_built"): "starting",
        ("building", "gave_up"): "failed",
        ("starting", "replica_ready"): "ready",
        ("starting", "replica_ended"): "starting",
        ("starting", "gave_up"): "failed",
        ("ready", "replica_ended"): "starting",
        ("ready", "gave_up"): "failed",
        ("building", "delete"): "deleting",
        ("starting", "delete"): "deleting",
        ("ready", "delete"): "deleting",
        ("failed", "delete"): "deleting",
        ("deleting", "cleared"): "deleted",
    },
    terminal=frozenset({"deleted"}),
)

REVISION = TransitionTable(
    "revision",
    {
        ("building", "bento_built"): "starting",
        ("building", "gave_up"): "failed",
        ("starting", "replica_ready"): "ready",
        ("starting", "replica_ended"): "starting",
        ("starting", "gave_up"): "failed",
        ("ready", "replica_ended"): "starting",
        ("ready", "gave_up"): "failed",
        ("building", "delete"): "retired",
        ("starting", "delete"): "retired",
        ("ready", "delete"): "retired",
        ("failed", "delete"): "retired",
    },
    terminal=frozenset({"retired"}),
)

JOB_OVER = frozenset({"succeeded", "failed", "cancelled", "timed_out"})
