"""The platform on one node: takes orders, runs attempts to their reported end, and may be killed at any moment."""
