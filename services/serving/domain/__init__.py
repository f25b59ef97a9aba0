"""What serving decides, without time, network or database."""
