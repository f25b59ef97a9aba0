"""The registry: the catalogue of who, what, and where it came from.

Owns: users, teams, memberships, tokens, sign-in codes and the audit of their changes; projects; secrets;
models and their versions; and, in a database of its own so that ingest never blocks a login, runs with their
params, metrics and tags.
Listens to: requests and queries about these; the scheduler's job events, from which runs are made; its own
project.moved and project.purged, by which runs follow their projects.
Emits: project.created|updated|archived|deleted|restored|moved|purged, model.registered, token.revoked, run.logged.
Never: runs a job, opens a model file, sees a token (only hashes reach it), or shows a secret to a person.
"""
