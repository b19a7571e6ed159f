"""`python -m llmprune` is the command line."""

import sys

from llmprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
