"""What infra/setup.py is made of. Standard library only, and read by the Pythons that it refuses, too."""
