"""The platform on one machine: starts NATS, S3, Ray and Traefik from installed wheels, and the six services.

The only place that knows of "embedded": services are given addresses and credentials and cannot tell the
difference.
"""
