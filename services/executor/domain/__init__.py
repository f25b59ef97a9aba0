"""What an execution may do next and which nodes can be counted on: pure, with time as an argument."""
