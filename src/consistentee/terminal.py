"""What the commands say and where: standard output, files that appear whole, errors of the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from rich.console import Console

from consistentee.atomic import atomic_path, is_replaceable, open_in_place
from consistentee.options import UsageError

T = TypeVar("T")


def console() -> Console:
    """Standard output; wide enough for our tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def say(message: str) -> None:
    """One line on standard output, as it is."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def progress_line(title: str) -> None:
    """What is being done, on standard error, in the place of what was being done before."""
    sys.stderr.write(f"\r{title} ...\x1b[K")
    sys.stderr.flush()


@contextmanager
def text_stream(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when the block ends without an error; a pipe or device gets each line."""
    if path is None:
        yield sys.stdout
        return
    if not is_replaceable(path):
        with io.TextIOWrapper(open_in_place(path), encoding="utf-8") as stream:
            yield stream
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream


def usage(check: Callable[[], T]) -> T:
    """What the function returns; a value that it refuses was given on the command line.

    Raises:
        UsageError: in place of ValueError.
    """
    try:
        return check()
    except ValueError as error:
        raise UsageError(str(error)) from error


def at_least_one(**values: float | None) -> None:
    """Check options that count something; None is one that was not given.

    Raises:
        UsageError: a value below 1, by the option's name.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
