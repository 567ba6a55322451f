"""Starts the command line: python -m megaopus VERB."""

import sys

from megaopus.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
