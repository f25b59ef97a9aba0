"""Keeps file sets (workspaces, artifacts, models, bentos) and the logs of jobs.

Owns: which files a set has, where its objects are and whether they are whole; every line of every log.
Listens to: requests and queries about file sets and logs, log frames of node agents, and the beginning and end of
jobs (job.starting, job.succeeded, job.failed, job.cancelled, job.timed_out).
Emits: fileset.sealed, log.sealed, and each line live on nabla.tail.
Never does: see the bytes of a file set, which travel between client and object store by presigned URL; run,
unpack or read what is in them.
"""
