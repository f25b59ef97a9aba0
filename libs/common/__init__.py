"""What every service stands on: contracts, bus, store, telemetry. Knows no service."""
