"""The gateway: HTTP in front, the bus behind, nothing kept in between.

Owns: nothing. It holds no state beyond a minute's cache of whose token is whose.
Listens to: `service.get`; hints on core NATS (`token.revoked`, job events, live log lines); the event stream, for
clients that follow it.
Emits: nothing of its own; it turns calls into requests and queries to the owners.
Never: moves bulk bytes, decides who may do what with an object, knows Ray, S3 or BentoML, configures the proxy.
"""
