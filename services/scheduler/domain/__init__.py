"""What a job is, how it may move, and who gets which machine: pure and synchronous."""
