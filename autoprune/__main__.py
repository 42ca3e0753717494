"""`python -m autoprune`: the command line."""

from autoprune.cli import main

if __name__ == "__main__":
    main()
