"""What the commands say and where: standard output, files that appear whole, signals, errors of the command line."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console, Group
from rich.table import Table

from consistentee.atomic_files import atomic_path, is_replaceable, open_in_place, user_path
from consistentee.errors import UsageError

T = TypeVar("T")

OUTPUTS = {"output": "--output", "json_file": "--json", "plot": "--plot"}
"""Parameters of commands that name a file to write."""


class Stopped(KeyboardInterrupt):
    """The system asked the process to end; whatever is half done is cleared away, as after Ctrl-C.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM, and a closing terminal's SIGHUP, into `Stopped`, unless somebody handles or ignores them."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        mine = []
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


class LastingStream:
    """A stream that work outlasts: once it cannot be written to, what is written is dropped.

    Args:
        stream: written to as long as it goes; None is one that was closed from the start.
        on_loss: called once, when it first fails.
    """

    def __init__(self, stream: TextIO | None, on_loss: Callable[[], object] = lambda: None) -> None:
        self._stream, self._on_loss, self._lost = stream, on_loss, stream is None

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what is not dropped."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether it is a terminal, and still there."""
        return not self._lost and self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._lost or self._stream is None:
            return
        try:
            action(self._stream)
        except UnicodeError:
            raise
        except (OSError, ValueError):  # nobody reads it, the disk is full, or it has been closed
            self._lost = True
            forget(self._stream)
            self._on_loss()


def forget(stream: TextIO) -> None:
    """Let what is still to be written to a stream go nowhere: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def hold_standard_streams() -> None:
    """Bear with standard streams that were closed by who started us, and keep their numbers from files opened later."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = cast(TextIO, LastingStream(None))


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Work in here does not end with the readers of standard output and error: what it makes is more than its words."""
    before = sys.stdout, sys.stderr
    errors = LastingStream(sys.stderr)
    note = "consistentee: nobody reads standard output any more; the work goes on.\n"
    sys.stdout = cast(TextIO, LastingStream(sys.stdout, on_loss=lambda: errors.write(note)))
    sys.stderr = cast(TextIO, errors)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def tuned_note(config: Any) -> str:
    """What agreement is, where a model was tuned from another one that nobody has named."""
    return (
        "Agreement is with this folder's own full depth. Its backbone was tuned, so that is not the model that it was "
        f"made of: for that give --reference {config.original['name']}"
    )


def console() -> Console:
    """Standard output; wide enough for our tables where it is not a terminal. Brackets in names are no markup."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)


def show_tables(group: Group) -> None:
    """Tables, and texts between them, on standard output; where that is not a terminal, as wide as the widest table."""
    place = console()
    if not sys.stdout.isatty():
        without_end = place.options.update(max_width=10_000)
        tables = [part for part in group.renderables if isinstance(part, Table)]
        place.width = max(place.width, *(place.measure(part, options=without_end).maximum for part in tables))
    place.print(group)


def say(message: str) -> None:
    """One line on standard output, as it is."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def progress_line(title: str) -> None:
    """What is being done, on standard error, in the place of what was being done before."""
    sys.stderr.write(f"\r{title} ...\x1b[K")
    sys.stderr.flush()


@contextmanager
def announced() -> Iterator[tuple[Callable[[float], None], Callable[[str], None]]]:
    """Say how long work will take, then what is being done: on a terminal in place, elsewhere at the pace of lines.

    Yields:
        Two functions: one takes the seconds that it will take, about, the other what is being done.
    """
    from consistentee.progress import TimedLines, duration

    lines: list[TimedLines] = []

    def announce(seconds: float) -> None:
        on_terminal = sys.stderr.isatty()
        place = "\r\x1b[K" if on_terminal else ""
        sys.stderr.write(f"{place}This takes about {duration(seconds)}.\n")
        sys.stderr.flush()
        if not on_terminal:
            lines.append(TimedLines("benchmark", seconds))

    def tick(title: str) -> None:
        if sys.stderr.isatty():
            progress_line(title)
        for line in lines:
            line.now_doing(title)

    try:
        yield announce, tick
    finally:
        for line in lines:
            line.close()
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
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


def say_reading(file: str, what: str) -> None:
    """Tell a person at a terminal that standard input is read."""
    if file == "-" and sys.stdin.isatty():
        sys.stderr.write(f"Reading {what} from standard input, one a line; end with Ctrl-D.\n")


def is_first_process() -> bool:
    """Whether this process speaks for all that a launcher has started; asked before accelerate has set them up."""
    return int(os.environ.get("RANK", "0")) == 0


def check_one_reader(file: str) -> None:
    """Raise UsageError where several processes would share what can be read once only."""
    from consistentee.data.files import is_stream

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and is_stream(file):
        name = "Standard input" if file == "-" else f'"{file}"'
        raise UsageError(
            f"{name} can be read by one process only, and there are {processes}. Save the texts to a file, and give "
            "that."
        )


def check_plot_file(path: Path | None) -> None:
    """Raise before the work, not after it, unless a picture can be drawn into the file."""
    if path is not None:
        from consistentee.evaluation.plots import check_plot

        usage(lambda: check_plot(path))
        check_place("--plot", path)


def check_json_file(path: Path | None) -> None:
    """Raise before the work, not after it, unless figures can be written into the file."""
    if path is not None:
        check_place("--json", path)


def check_place(option: str, path: Path) -> None:
    """Raise UsageError unless a file may be made or replaced there; folders above it are made."""
    if os.path.isdir(path):
        raise UsageError(f'{option} must be a file, got the folder "{path}". Give the name of a file in it.')
    in_place = os.path.exists(path) and not is_replaceable(path)
    above = (place for place in Path(os.path.realpath(path)).parents if os.path.exists(place))
    written = path if in_place else next(above)
    _check_written(option, written, "file", in_place)


def check_outputs(arguments: Mapping[str, object]) -> None:
    """Raise UsageError where a file that is to be written is one that is read, whose content would be lost.

    Args:
        arguments: of a command, by the names of its parameters; groups of options are dataclasses.
    """
    given = list(_values(arguments))
    read = [str(value) for name, value in given if name not in OUTPUTS and isinstance(value, str | Path)]
    for name, value in given:
        if name not in OUTPUTS or not isinstance(value, Path) or not value.is_file():
            continue
        same = [file for file in read if os.path.isfile(file) and os.path.samefile(file, value)]
        with suppress(OSError):  # closed
            if os.path.samestat(os.fstat(0), value.stat()):
                same.append("standard input")
        if same:
            raise UsageError(
                f'{OUTPUTS[name]} must be another file than what is read, got "{value}", which is {same[0]}. Give '
                "another name."
            )


def _values(arguments: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Names and values of parameters, those of groups and of lists one by one."""
    for name, value in arguments.items():
        if is_dataclass(value) and not isinstance(value, type):
            yield from _values({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, list | tuple):
            yield from ((name, one) for one in value)
        else:
            yield name, value


def check_folder(option: str, path: Path) -> None:
    """Raise UsageError unless a folder may be made there, or filled; folders above it are made."""
    place = Path(os.path.realpath(user_path(path)))
    _check_written(option, next(one for one in (place, *place.parents) if os.path.exists(one)), "folder")


def _check_written(option: str, written: Path, what: str, in_place: bool = False) -> None:
    if not in_place and not written.is_dir():
        raise UsageError(f'{option} must lie in a folder, and "{written}" is none. Give another {what}.')
    if not os.access(written, os.W_OK):
        raise UsageError(f'{option} must be writable, and "{written}" is not. Give another {what}.')


def save_figures(
    figures: dict[str, Any],
    json_file: Path | None,
    plot: Path | None = None,
    draw: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write all figures to a file and draw a picture of them, and say so, where they are asked for.

    What is not a finite number, which JSON has no name for, is null there: it is no reason to lose the others.
    """
    from consistentee.atomic_files import write_json

    if json_file is not None:
        write_json(json_file, _finite(figures))
        say(f"Figures written to {json_file}")
    if plot is not None:
        draw(plot)
        say(f"Picture written to {plot}")


def _finite(value: Any) -> Any:
    """The same value with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
