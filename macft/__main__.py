"""`python -m macft` runs the command line."""

from macft.cli import main

if __name__ == "__main__":
    main()
