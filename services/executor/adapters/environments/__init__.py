"""A job's Python packages: what is asked for, built once behind walls, and kept by its hash."""
