"""The way of people into a running job."""
