"""What outlives the agent: an attempt's folder and its records, and the shim that watches over the job."""
