"""The six services. They meet only in messages: none imports another."""

# In the order in which they are started: whoever is asked most comes first.
SERVICES = ("registry", "scheduler", "storage", "executor", "serving", "gateway")
