"""``python -m moe_lightning VERB ...``."""

import signal
import sys


def run() -> None:
    """Run the command line and leave with its exit code."""
    from moe_lightning.cli.main import main

    code = main(sys.argv[1:])
    # A second Ctrl-C, while the interpreter ends, must neither change the code nor print pages.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    run()
