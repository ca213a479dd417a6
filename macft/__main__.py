"""Run the command line as `python -m macft`."""

from macft.cli import main

if __name__ == "__main__":
    main()
