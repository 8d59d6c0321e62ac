"""``python -m moe_lightning VERB ...``."""

import sys


def run() -> None:
    """Run the command line and leave with its exit code."""
    from moe_lightning.cli.main import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
