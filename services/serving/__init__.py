"""Serving: publishes registered models as endpoints, through real BentoML replicas behind Traefik.

Owns: deployments and their revisions, endpoint tokens, and every endpoint: it is the only writer of Traefik's
configuration, the routes of UI, API and object store included.
Listens to: requests and queries about deployments; the events of the jobs that it ordered.
Emits: deployment.created, .starting, .ready, .failed, .deleted; orders and halts build and replica jobs.
Never: trains, or loads a model file: both builds and replicas are sandboxed jobs.
"""
