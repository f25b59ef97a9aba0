"""Runs attempts on the machines of one Ray cluster.

Owns: executions (runs of attempts on machines: node, GPU indices, process, end) and the node inventory, with drains and
the tickets by which machines join.
Listens to: commands execution.start, execution.stop (scheduler) and execution.report (node agents), events log.sealed
and demand.changed; requests node.drain, node.invite, node.admit;
asks storage for seals that nobody told.
Emits: execution.running, execution.finishing, execution.ended, node.reported.
Never: chooses who runs or where, opens a new attempt, or declares a run lost before its node's fence has passed.
"""
