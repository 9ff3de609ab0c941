"""``python -m gobelin``: the command line."""

from gobelin.cli.main import main

if __name__ == "__main__":
    main()
