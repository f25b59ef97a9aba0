"""`python -m nabla` is the command line, for whoever cannot rely on a PATH."""

from nabla.cli import main

if __name__ == "__main__":
    main()
