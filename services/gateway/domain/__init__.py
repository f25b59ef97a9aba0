"""What the gateway decides, without input or output."""
