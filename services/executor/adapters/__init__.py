"""The executor's ports made real: what touches Ray, processes, sandboxes and disks."""
