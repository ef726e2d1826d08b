"""The command line; each command has a file of its own. Heavy libraries are imported inside, so that `--help` is quick.

Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted, 143 ended by SIGTERM (129 by SIGHUP). A failure is one
line on standard error that says what to do; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from consistentee import __version__
from consistentee.atomic_files import user_path
from consistentee.cli.ablate import ablate_command
from consistentee.cli.benchmark import benchmark
from consistentee.cli.calibrate import calibrate
from consistentee.cli.compare import compare_command
from consistentee.cli.evaluate import evaluate
from consistentee.cli.export import export_command
from consistentee.cli.generate import generate
from consistentee.cli.predict import predict
from consistentee.cli.probe import probe_command
from consistentee.cli.report import report_command
from consistentee.cli.retrofit import retrofit_command
from consistentee.cli.serve import serve
from consistentee.cli.terminal import (
    Stopped,
    check_outputs,
    forget,
    hold_standard_streams,
    outlasting_readers,
    stoppable,
)
from consistentee.cli.train import finetune_command, train_command
from consistentee.errors import SettingError

_CONTINUE: dict[str, str] = {
    **dict.fromkeys(("train", "finetune", "retrofit"), "Continue with the same command and --resume."),
    **dict.fromkeys(("compare", "ablate"), "Continue with the same command."),
}

app = App(
    name="consistentee",
    help=(
        "Early exits for transformers: hard inputs use all the layers, easy ones exit early. Classifiers: train, "
        "evaluate, predict. Text generators, whose tokens exit one by one: train, evaluate, generate."
    ),
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),
)


COMMANDS = {
    "train": train_command,
    "finetune": finetune_command,
    "probe": probe_command,
    "retrofit": retrofit_command,
    "evaluate": evaluate,
    "predict": predict,
    "generate": generate,
    "export": export_command,
    "benchmark": benchmark,
    "calibrate": calibrate,
    "compare": compare_command,
    "ablate": ablate_command,
    "report": report_command,
    "serve": serve,
}
for _name, _command in COMMANDS.items():
    app.command(_command, name=_name)
OUTLASTING = tuple(name for name in COMMANDS if name not in ("probe", "predict", "generate"))
"""Commands whose work is more than what they print: it goes on when nobody reads that any more."""

ANSWERING = ("predict", "generate")
"""Commands with answers to every input of a file, which they take without an option."""
HYPHEN_IS_A_VALUE = (
    "--prompt", "--input", "--stop", "--file", "--texts", "--unlabelled-file", "--calibration-file",
)  # fmt: skip
"""Options that may be "-": a text, or standard input."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    go_on = _CONTINUE.get(given[0] if given else "", "")
    if "--ray-blocks" in given:
        go_on = "The same command goes on from the finished blocks."
    with suppress(AttributeError):  # a stream that a test put in place, or none
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with stoppable():
            _run(given, debug)
    except Stopped as stopped:
        return _fail(f"Ended by {signal.Signals(stopped.number).name}. {go_on}".strip(), 128 + stopped.number)
    except KeyboardInterrupt:
        return _fail(f"Interrupted. {go_on}".strip(), 130)
    except BrokenPipeError as error:
        if given[0] in OUTLASTING:  # it was not about what they print
            return _fail(_advice(error), 1)
        forget(sys.stdout)
        return 0  # the reader has had enough: not a failure
    except (CycloptsError, SettingError) as error:
        return _fail(_one_line(error), 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        return _fail(_advice(error), 1)
    return 0


def _run(arguments: list[str], debug: bool) -> None:
    """Find the command, and run it."""
    hold_standard_streams()
    command, bound, _ = app.parse_args(place_hyphens(arguments), exit_on_error=False, print_error=False)
    name = next((name for name, known in COMMANDS.items() if known is command), None)
    if sys.stdout is None and name in ANSWERING and bound.arguments.get("output") is None:
        raise OSError("Standard output is closed, so the answers have nowhere to go. Give --output.")
    bound.arguments.update((name, at_home(value)) for name, value in tuple(bound.arguments.items()))
    check_outputs(bound.arguments)
    with warnings.catch_warnings(), outlasting_readers() if name in OUTLASTING else nullcontext():
        if not debug and name:
            _quieten_libraries()
        if name:
            from consistentee.inference.threads import limit_threads

            limit_threads()
        command(*bound.args, **bound.kwargs)
    if sys.stdout is not None:
        sys.stdout.flush()


def _quieten_libraries() -> None:
    """Keep back warnings and progress bars of other libraries; what matters to the user we say ourselves."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault(
        "HF_DATASETS_DISABLE_PROGRESS_BARS", "1"
    )  # read when `datasets` is imported, if it ever is
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def at_home(value: Any) -> Any:
    """A value of an option, with the user's folder for "~" in paths: shells leave it in `--output-dir=~/runs`."""
    if isinstance(value, Path):
        return user_path(value)
    if is_dataclass(value) and not isinstance(value, type):
        paths = {field.name: getattr(value, field.name) for field in fields(value)}
        changed = {name: user_path(path) for name, path in paths.items() if isinstance(path, Path)}
        return replace(value, **changed) if changed else value
    return value


def place_hyphens(arguments: list[str]) -> list[str]:
    """Join "-" to its option, as in `--texts=-`, or put it, as the file, behind "--": elsewhere it is no value."""
    if "--" in arguments:
        return arguments
    command = arguments[0] if arguments else ""
    flags: set[str] = set()
    if command in ANSWERING and "-" in arguments:
        options = app[command].assemble_argument_collection()
        flags = {name for option in options if option.hint is bool for name in option.names}
    placed: list[str] = []
    file: list[str] = []
    option = ""
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        if argument.startswith("--"):
            option = argument.partition("=")[0]
        waiting = before.startswith("--") and "=" not in before and before not in flags
        if argument != "-":
            placed.append(argument)
        elif waiting and option in HYPHEN_IS_A_VALUE:
            placed[-1] = f"{option}=-"
        elif command in ANSWERING and not waiting:
            file = ["--", "-"]
        elif option in ("--texts", "--unlabelled-file"):
            placed.append(f"{option}=-")
        else:
            placed.append(argument)
    return [*placed, *file]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _advice(error: Exception) -> str:
    """What went wrong and what to do about it, on one line."""
    message = _one_line(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "There is not enough memory. Lower --batch-size or --max-length."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return message
    return f"{type(error).__name__}: {message} (run again with --debug for the traceback)"


def _fail(message: str, code: int) -> int:
    """One line on standard error, and the exit code."""
    with suppress(OSError):
        sys.stderr.write(f"consistentee: {message}\n")
        sys.stderr.flush()
    return code
