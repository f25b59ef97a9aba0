"""Storage's ports made real: S3 through the minio client, live tails on NATS."""
