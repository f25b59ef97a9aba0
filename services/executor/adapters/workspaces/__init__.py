"""Where code and data of a job come from, and where what it leaves goes."""
