"""The registry's ports, made real."""
