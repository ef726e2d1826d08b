"""Generated tokens in the colour of the layer at which each exited, or with marks where there is no colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

# From blue (first layer) over violet to orange (last layer): equal steps of hue in Oklch at one luminance, 0.19, so
# that every colour has a contrast of at least 4 with black and with white; told apart under red-green blindness.
PALETTE = (
    "#027BD3",
    "#516DF1",
    "#8160EB",
    "#A453D7",
    "#BE47B8",
    "#D13D91",
    "#DC3865",
    "#DE3D2C",
    "#C25B05",
)
RANGES = 6  # of layers, at most, in a legend
BRACKETS, ASCII_BRACKETS = "⟨⟩", "<>"


def layer_colour(exit_layer: int, num_hidden_layers: int) -> str:
    """The colour of a layer on a terminal, cool for early and warm for late.

    Args:
        exit_layer: from 1.
        num_hidden_layers: layers of the model.

    Returns:
        `#RRGGBB`, which can be read on a dark and on a light ground.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> layer_colour(1, 30), layer_colour(30, 30)
        ('#027bd3', '#c25b05')
    """
    _check_layer(exit_layer, num_hidden_layers)
    place = (exit_layer - 1) / max(num_hidden_layers - 1, 1) * (len(PALETTE) - 1)
    low = min(int(place), len(PALETTE) - 2)
    pairs = zip(_channels(PALETTE[low]), _channels(PALETTE[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (place - low) * (b - a)):02x}" for a, b in pairs)


def can_colour(console: Console) -> bool:
    """Whether colours reach the reader: a terminal that has them, and NO_COLOR is not set."""
    return console.color_system is not None and not console.no_color


def legend(
    num_hidden_layers: int,
    exit_layers: Sequence[int],
    *,
    colour: bool = True,
    brackets: str = BRACKETS,
    lossless: bool = False,
) -> Text:
    """What the colours or the marks mean, with the share of tokens that exited in each range of layers.

    Args:
        num_hidden_layers: layers of the model.
        exit_layers: (tokens,) the layer at which each token exited, from 1.
        colour: whether the text has colours; without them it has marks.
        brackets: two characters, before and after the layer in a mark.
        lossless: whether these are layers at which tokens were drafted, the last one where none was.

    Raises:
        ValueError: there is no such layer.
    """
    for layer in exit_layers:
        _check_layer(layer, num_hidden_layers)
    text = Text()
    if not colour:
        mark = f"{brackets[0]}n{brackets[1]}"
        how = "was drafted" if lossless else "exited"
        text.append(
            f"{mark}: the text before it, back to the last mark, {how} after n of {num_hidden_layers} layers"
        )
        text.append(", or not drafted.\n" if lossless else ".\n")
    text.append("drafted after layers" if lossless else "layers")
    for first, last in _ranges(num_hidden_layers):
        share = sum(first <= layer <= last for layer in exit_layers) / max(len(exit_layers), 1)
        text.append("  ")
        if colour:
            text.append("■ ", style=layer_colour((first + last) // 2, num_hidden_layers))
        text.append(f"{first}" if first == last else f"{first}-{last}")
        text.append(f" {100 * share:.0f}%" if colour else f": {100 * share:.0f}%")
    return text


class ExitPrinter:
    """Writes tokens as they are generated, then the legend and the mean exit layer.

    Args:
        output: a rich console, or a text stream such as `sys.stdout`.
        num_hidden_layers: layers of the model.
        colour: whether to colour the tokens; marks are written otherwise. None finds out what the output can do.
            A console without colours gets marks in any case; a stream that is no terminal gets colours if told so.
        lossless: whether tokens come with the layer at which they were drafted, see `GeneratedText.draft_layers`.

    Example:
        >>> import io
        >>> stream = io.StringIO()
        >>> printer = ExitPrinter(stream, 4, colour=False)
        >>> for piece, exit_layer in [("The", 4), (" cat", 4), (" sat", 1)]:
        ...     printer.put(piece, exit_layer)
        >>> stream.getvalue()
        'The cat⟨4⟩ sat'
    """

    def __init__(
        self,
        output: Console | TextIO,
        num_hidden_layers: int,
        *,
        colour: bool | None = None,
        lossless: bool = False,
    ) -> None:
        self._console = output if isinstance(output, Console) else _console(output, colour)
        self._colour = colour is not False and can_colour(self._console)
        self._brackets = _brackets_for(self._console.encoding)
        self._num_hidden_layers, self._lossless = num_hidden_layers, lossless
        self._exit_layers: list[int] = []
        self._visible = False  # whether the run of equal layers that is being written has a letter
        self._space = ""  # white space that is held back, for it comes after a mark

    def put(self, piece: str, exit_layer: int) -> None:
        """Write one token.

        Args:
            piece: its text.
            exit_layer: the layer at which it exited, from 1.

        Raises:
            ValueError: there is no such layer.
        """
        _check_layer(exit_layer, self._num_hidden_layers)
        if self._colour:
            self._write(piece, layer_colour(exit_layer, self._num_hidden_layers))
        else:
            if self._exit_layers and self._exit_layers[-1] != exit_layer:
                self._mark()
            text = self._space + piece
            letters = text.rstrip()
            self._space = text[len(letters) :]
            self._visible = self._visible or bool(letters)
            self._write(letters)
        self._exit_layers.append(exit_layer)

    def end(self, *, drafted: int | None = None, accepted: int | None = None) -> None:
        """Finish the text and explain it. The next token begins another text.

        Args:
            drafted, accepted: of `lossless` mode: drafts that were verified, and those that stayed.
        """
        if not self._colour:
            self._mark()
        self._write("\n")
        layers, self._exit_layers = self._exit_layers, []
        if not layers:
            return
        depth = self._num_hidden_layers
        note = Text("\n")
        note.append(
            legend(depth, layers, colour=self._colour, brackets=self._brackets, lossless=self._lossless)
        )
        mean = float(depth) if self._lossless else sum(layers) / len(layers)
        note.append(
            f"\nmean exit layer {mean:.2f} of {depth}, layer speed-up {depth / mean:.2f}x, {len(layers):,} tokens"
        )
        if self._lossless:
            share = sum(layer < depth for layer in layers) / len(layers)
            note.append(
                f"\nall layers verified every token; {100 * share:.0f}% of them were drafted by exits"
            )
            if drafted:
                note.append(f", {100 * (accepted or 0) / drafted:.0f}% of {drafted:,} drafts stayed")
        self._console.print(note)

    def _mark(self) -> None:
        mark = f"{self._brackets[0]}{self._exit_layers[-1]}{self._brackets[1]}" if self._visible else ""
        self._write(mark + self._space)
        self._visible, self._space = False, ""

    def _write(self, text: str, style: str | None = None) -> None:
        if text:
            self._console.out(text, style=style, end="", highlight=False)


def _ranges(num_hidden_layers: int) -> list[tuple[int, int]]:
    """At most `RANGES` ranges (first layer, last layer), of sizes as equal as can be."""
    count = min(RANGES, num_hidden_layers)
    ends = [(part + 1) * num_hidden_layers // count for part in range(count)]
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def _console(stream: TextIO, colour: bool | None) -> Console:
    """A console on a stream: colours as told; the full range of them where no terminal says what it can do."""
    if colour is None:
        return Console(file=stream)
    if not colour:
        return Console(file=stream, color_system=None)
    return Console(
        file=stream,
        force_terminal=True,
        no_color=False,
        color_system="auto" if stream.isatty() else "truecolor",
    )


def _brackets_for(encoding: str) -> str:
    try:
        BRACKETS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII_BRACKETS
    return BRACKETS


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _check_layer(exit_layer: int, num_hidden_layers: int) -> None:
    if not 1 <= exit_layer <= num_hidden_layers:
        raise ValueError(
            f"exit_layer must be from 1 to {num_hidden_layers}, got {exit_layer}. Layers count from 1."
        )
