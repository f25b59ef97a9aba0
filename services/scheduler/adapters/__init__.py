"""The scheduler's ports, made real."""
