"""Runs attempts on the machines of one Ray cluster.

Owns: executions (runs of attempts on machines: node, GPU indices, process, end) and the node inventory.
Listens to: commands execution.start, execution.stop (scheduler) and execution.report (node agents), event log.sealed;
asks storage for seals that nobody told.
Emits: execution.running, execution.finishing, execution.ended, node.reported.
Never: chooses who runs or where, opens a new attempt, or declares a run lost before its node's fence has passed.
"""
