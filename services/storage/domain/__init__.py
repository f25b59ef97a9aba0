"""What a file set and a log are and how they change: pure, no clock, no network."""
