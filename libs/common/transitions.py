"""One transition table per aggregate: the only place where its states and moves are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from libs.common.errors import IllegalTransition


@dataclass(frozen=True)
class TransitionTable:
    """Which trigger leads from which state to which.

    Args:
        aggregate: for error messages.
        moves: (state, trigger) -> next state.
        terminal: states that absorb: every trigger in them is a no-op, as it comes from a late message.
    """

    aggregate: str
    moves: Mapping[tuple[str, str], str]
    terminal: frozenset[str]

    def next_state(self, object_id: str, state: str, trigger: str) -> str:
        """The state after `trigger`; the same state when the move was made already or the state is terminal.

        Raises:
            IllegalTransition: the table has no such move.
        """
        if state in self.terminal:
            return state
        target = self.moves.get((state, trigger))
        if target is not None:
            return target
        if state in {to for (_, name), to in self.moves.items() if name == trigger}:
            return state
        raise IllegalTransition(self.aggregate, object_id, state, trigger)

    @property
    def states(self) -> frozenset[str]:
        return frozenset(state for state, _ in self.moves) | frozenset(self.moves.values()) | self.terminal
