"""A sandbox's own network: how it is made, what it may reach, and who takes it away."""
