"""The scheduler's own work beside its handlers: placing, and making sure."""
