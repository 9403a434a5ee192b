"""``python -m growkern``: the command line."""

from growkern.cli.main import main

if __name__ == "__main__":
    main()
