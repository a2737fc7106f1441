"""``python -m musigma``."""

from musigma.cli import main

if __name__ == "__main__":
    main()
