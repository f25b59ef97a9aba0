"""The contract of the platform: messages (generated from proto/), how they are wrapped, and where they go."""
