"""Where the command line starts: it imports next to nothing, so that Ctrl-C has an answer from the first moment on."""

from __future__ import annotations

import sys


def run_command_line() -> int:
    """Import the command line and run it on the arguments of the process; its exit code."""
    try:
        from consistentee.cli.main import main

        return main()
    except KeyboardInterrupt:  # while it was imported: `main` answers for itself
        sys.stderr.write("consistentee: Interrupted.\n")
        return 130
