"""The REST API: one module per resource, and what they share."""
