"""The machines that jobs run on."""

from __future__ import annotations

from nabla.decoding import decode
from nabla.errors import NablaError
from nabla.objects import Node, NodeInvitation, NodePage
from nabla.resources.base import Resource, segment


class Nodes(Resource):
    def page(self) -> NodePage:
        """All nodes, and why there is none where that is so."""
        return decode(NodePage, self._transport.get("/nodes"))

    def list(self) -> tuple[Node, ...]:
        return self.page().items

    def get(self, node: str) -> Node:
        """By id, by the beginning of one, or by host name, where that means one node alone."""
        nodes = self.list()
        found = [each for each in nodes if each.id.startswith(node)] or [n for n in nodes if n.hostname == node]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(each.id[:12] for each in found)
            raise NablaError(f"{node} means {len(found)} nodes: {ids}.", "Name one of them by its id.")
        raise NablaError(f"There is no node {node}.", "`nabla nodes list` shows them.")

    def drain(self, node: str) -> Node:
        """No new work for it; it rests when what runs there has ended."""
        return decode(Node, self._transport.post(f"/nodes/{segment(self.get(node).id)}/drain", {}))

    def undrain(self, node: str) -> Node:
        return decode(Node, self._transport.request("DELETE", f"/nodes/{segment(self.get(node).id)}/drain"))

    def invite(self) -> NodeInvitation:
        """The command that makes one machine a node, once and soon."""
        return decode(NodeInvitation, self._transport.post("/nodes/tokens", {}))
