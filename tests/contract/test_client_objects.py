"""The client's own objects against the contract: it must know every field of what it shows, and no other.

The client cannot import the platform, so it has its own classes; this is what keeps them the same.
"""

from __future__ import annotations

import pytest

from libs.common.contracts import messages
from nabla import objects
from nabla.record import Record

pytestmark = pytest.mark.contract

# Made by the gateway, or an envelope around others.
ONLY_IN_REST = {"NodeInvitation", "SignInLink", "Status"}
# What only the services themselves need of a message.
NOT_FOR_CLIENTS = {"record_revision", "revision", "desired_state", "scopes"}
SHARED = sorted(kind.__name__ for kind in Record.__subclasses__() if kind.__module__ == objects.__name__)


@pytest.mark.parametrize("name", [name for name in SHARED if name not in ONLY_IN_REST])
def test_a_clients_object_has_no_field_that_the_contract_lacks(name: str) -> None:
    ours = set(getattr(objects, name).__annotations__)
    contract = set(getattr(messages, name).model_fields)
    assert ours <= contract, f"unknown to the contract: {sorted(ours - contract)}"


@pytest.mark.parametrize("name", ["JobTemplate", "Resources", "Environment", "ModelOutput", "LogLine", "Point"])
def test_what_a_client_sends_can_say_everything(name: str) -> None:
    ours = set(getattr(objects, name).__annotations__)
    contract = set(getattr(messages, name).model_fields)
    assert contract - ours <= NOT_FOR_CLIENTS | {"kind", "inputs", "ports"}, sorted(contract - ours)
