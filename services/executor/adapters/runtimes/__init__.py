"""The walls around a job, behind one port: bubblewrap, podman, or none; and the images that they run."""
