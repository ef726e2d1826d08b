"""`python -m consistentee`: the command line."""

from __future__ import annotations

import sys

from consistentee.cli.start import run_command_line

if __name__ == "__main__":
    sys.exit(run_command_line())
