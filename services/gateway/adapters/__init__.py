"""The gateway's ports on NATS and on disk."""
