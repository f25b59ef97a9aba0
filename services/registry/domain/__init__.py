"""What the registry decides, without time, chance or a database of its own."""
