"""Every state of deployments and revisions against every trigger."""

from __future__ import annotations

from itertools import product

import pytest

from libs.common.errors import IllegalTransition
from libs.common.transitions import TransitionTable
from services.serving.domain.lifecycles import DEPLOYMENT, REVISION

pytestmark = pytest.mark.unit

TRIGGERS = ("bento_built", "replica_ready", "replica_ended", "gave_up", "delete", "cleared")
ILLEGAL = "illegal"
# What each state answers to the triggers in the order above. A repeated trigger stays where it is.
DEPLOYMENT_ANSWERS = {
    "building": ("starting", ILLEGAL, ILLEGAL, "failed", "deleting", ILLEGAL),
    "starting": ("starting", "ready", "starting", "failed", "deleting", ILLEGAL),
    "ready": (ILLEGAL, "ready", "starting", "failed", "deleting", ILLEGAL),
    "failed": (ILLEGAL, ILLEGAL, ILLEGAL, "failed", "deleting", ILLEGAL),
    "deleting": (ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, "deleting", "deleted"),
    "deleted": ("deleted",) * 6,
}
REVISION_ANSWERS = {
    "building": ("starting", ILLEGAL, ILLEGAL, "failed", "retired", ILLEGAL),
    "starting": ("starting", "ready", "starting", "failed", "retired", ILLEGAL),
    "ready": (ILLEGAL, "ready", "starting", "failed", "retired", ILLEGAL),
    "failed": (ILLEGAL, ILLEGAL, ILLEGAL, "failed", "retired", ILLEGAL),
    "retired": ("retired",) * 6,
}
CASES = [
    (table, state, trigger, answer)
    for table, answers in ((DEPLOYMENT, DEPLOYMENT_ANSWERS), (REVISION, REVISION_ANSWERS))
    for state, row in answers.items()
    for trigger, answer in zip(TRIGGERS, row, strict=True)
]


@pytest.mark.parametrize(("table", "state", "trigger", "answer"), CASES)
def test_each_state_answers_each_trigger_as_the_table_says(
    table: TransitionTable, state: str, trigger: str, answer: str
) -> None:
    if answer == ILLEGAL:
        with pytest.raises(IllegalTransition, match=state):
            table.next_state("d1", state, trigger)
    else:
        assert table.next_state("d1", state, trigger) == answer


def test_the_cases_cover_all_states_and_triggers() -> None:
    for table, answers in ((DEPLOYMENT, DEPLOYMENT_ANSWERS), (REVISION, REVISION_ANSWERS)):
        assert table.states == set(answers)
        assert {trigger for _, trigger in table.moves} <= set(TRIGGERS)
    assert len(CASES) == len(list(product(DEPLOYMENT_ANSWERS, TRIGGERS))) + len(
        list(product(REVISION_ANSWERS, TRIGGERS))
    )
