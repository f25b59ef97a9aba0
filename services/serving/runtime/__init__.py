"""Programs that run inside sandboxed jobs, sent there as text; no service imports them.

build: turns a model's files into a bento. replica: starts BentoML on it. endpoint: the BentoML service in the bento.
They need the standard library, and what the job's environment has: bentoml and the model's framework.
"""
