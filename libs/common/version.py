"""The version of the platform, the same in every service and in the client."""

VERSION = "0.1.0"
