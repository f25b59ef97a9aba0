"""Ray: nodes, reservations, and the one actor on each node that is the agent."""
