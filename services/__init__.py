"""The services of the platform: each owns its data and meets the others only in contracts."""
