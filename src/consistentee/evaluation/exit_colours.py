"""Generated tokens in the colour of the layer at which each left: for the terminal, without colour, as a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.text import Text

from consistentee.atomic_files import atomic_path
from consistentee.errors import require_extra
from consistentee.evaluation.plots import GREY, INK, check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
# The same way for backgrounds under black letters, and darker with every layer.
BACKGROUNDS = ("#E4F1FB", "#CFDDFB", "#CFC8F8", "#DDB4EE", "#EEA3D3", "#F692AE", "#F8877F", "#F0904A")
RANGES = 6  # of layers, at most, in a legend
BRACKETS, ASCII_BRACKETS = "⟨⟩", "<>"

# A picture, in points. A letter of DejaVu Sans Mono, which matplotlib brings, is 0.602 times as wide as its size.
COLUMNS, FONT_SIZE = 95, 10.0
TITLE_LETTERS = 56  # of a title; the text's figures stand to its right
LETTER, LINE, MARGIN, TITLE = 0.602 * FONT_SIZE, 17.5, 14.0, 19.0


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


def coloured_tokens(pieces: Sequence[str], exit_layers: Sequence[int], num_hidden_layers: int) -> Text:
    """A generated text, each token in the colour of its layer.

    Args:
        pieces: (tokens,) the text token by token.
        exit_layers: (tokens,) the layer at which each left, from 1.
        num_hidden_layers: layers of the model.

    Raises:
        ValueError: the lists are of unequal length, or there is no such layer.
    """
    text = Text()
    for run, layer in _runs(pieces, exit_layers, num_hidden_layers):
        text.append(run, style=layer_colour(layer, num_hidden_layers))
    return text


def marked_tokens(
    pieces: Sequence[str], exit_layers: Sequence[int], num_hidden_layers: int, *, brackets: str = BRACKETS
) -> str:
    """A generated text without colour: tokens in a row that left at one layer, then that layer.

    White space at the end of such a row comes after the mark, and a row of nothing but white space gets none.

    Args:
        pieces: (tokens,) the text token by token.
        exit_layers: (tokens,) the layer at which each left, from 1.
        num_hidden_layers: layers of the model.
        brackets: two characters, before and after the layer.

    Raises:
        ValueError: the lists are of unequal length, or there is no such layer.

    Example:
        >>> marked_tokens(["The", " cat", " sat"], [12, 12, 3], 30)
        'The cat⟨12⟩ sat⟨3⟩'
    """
    marked = ""
    for run, layer in _runs(pieces, exit_layers, num_hidden_layers):
        visible = run.rstrip()
        marked += f"{visible}{brackets[0]}{layer}{brackets[1]}{run[len(visible) :]}" if visible else run
    return marked


def legend(
    num_hidden_layers: int,
    exit_layers: Sequence[int],
    *,
    colour: bool = True,
    brackets: str = BRACKETS,
    lossless: bool = False,
) -> Text:
    """What the colours or the marks mean, with the share of tokens that left in each range of layers.

    Args:
        num_hidden_layers: layers of the model.
        exit_layers: (tokens,) the layer at which each token left, from 1.
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
        how = "was drafted" if lossless else "left"
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
            exit_layer: the layer at which it left, from 1.

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


def exits_picture(
    rows: Sequence[tuple[Sequence[str], Sequence[int]]],
    path: str | Path,
    *,
    num_hidden_layers: int,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw generated texts, each token on a ground in the colour of its layer, over a scale of the colours.

    Args:
        rows: texts, each as its tokens and the layer at which each token left, from 1. Letters that DejaVu Sans
            Mono lacks, such as Chinese ones, are drawn as boxes.
        path: the picture, PNG, PDF or SVG by its ending; written whole or not at all.
        num_hidden_layers: layers of the model.
        titles: one for each text.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: another ending, no text, lists of unequal length, or a layer that does not exist.
    """
    path = Path(path)
    check_plot(path)
    titles = [""] * len(rows) if titles is None else titles
    if not rows or len(titles) != len(rows):
        raise ValueError(
            f"titles must name every text of at least one, got {len(titles)} titles and {len(rows)} texts."
        )
    for pieces, exit_layers in rows:
        _check_tokens(pieces, exit_layers, num_hidden_layers)
    texts = [_wrapped(pieces) for pieces, _ in rows]
    width = COLUMNS * LETTER + 2 * MARGIN
    scale = 42.0  # height of the scale and its labels
    height = sum(TITLE + LINE * len(lines) + MARGIN for lines in texts) + MARGIN + scale
    figure = require_extra("plot", "matplotlib.figure").Figure(
        figsize=(width / 72, height / 72), dpi=150, facecolor="white"
    )
    colours = require_extra("plot", "matplotlib.colors").LinearSegmentedColormap.from_list(
        "exits", BACKGROUNDS
    )
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, width), ylim=(height, 0))  # one unit is one point, from the upper left corner
    canvas.axis("off")
    top = MARGIN
    for lines, (_, exit_layers), title in zip(texts, rows, titles, strict=True):
        _draw_title(canvas, title, exit_layers, num_hidden_layers, top, width)
        top += TITLE
        for line in lines:
            for column, letters, token in line:
                place = (exit_layers[token] - 1) / max(num_hidden_layers - 1, 1)
                _draw_token(canvas, MARGIN + column * LETTER, top, letters, colours(place))
            top += LINE
        top += MARGIN
    bar = figure.add_axes((MARGIN / width, (scale - 8) / height, COLUMNS * LETTER / width, 9 / height))
    _draw_scale(bar, colours, num_hidden_layers)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
    return path


def layer_ticks(num_hidden_layers: int) -> list[int]:
    """Layers to name on an axis: the first, the last, and round ones between that leave room.

    Example:
        >>> layer_ticks(30)
        [1, 5, 10, 15, 20, 25, 30]
    """
    step = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if num_hidden_layers <= 12 * step)
    round_ones = range(step, num_hidden_layers - step // 2, step)
    return sorted({1, num_hidden_layers, *(layer for layer in round_ones if layer != 2)})


def _draw_title(
    canvas: Axes, title: str, exit_layers: Sequence[int], num_hidden_layers: int, top: float, width: float
) -> None:
    shown = title if len(title) <= TITLE_LETTERS else f"{title[: TITLE_LETTERS - 1].rstrip()}…"
    canvas.text(
        MARGIN, top + 6, shown, va="center", color=INK, fontsize=10, fontweight="bold", parse_math=False
    )
    if exit_layers:
        mean = sum(exit_layers) / len(exit_layers)
        note = f"mean exit layer {mean:.1f} of {num_hidden_layers}, layer speed-up {num_hidden_layers / mean:.2f}x"
        canvas.text(width - MARGIN, top + 6, note, va="center", ha="right", color=GREY, fontsize=9)


def _draw_token(canvas: Axes, left: float, top: float, letters: str, colour: Any) -> None:
    rectangle: Any = require_extra("plot", "matplotlib.patches").Rectangle
    size = (len(letters) * LETTER - 0.7, LINE - 2.5)  # a gap shows where tokens and lines end
    canvas.add_patch(rectangle((left + 0.35, top), *size, facecolor=colour, edgecolor="none"))
    canvas.text(
        left,
        top + 0.72 * size[1],
        letters,
        color=INK if letters != "↵" else GREY,
        fontfamily="DejaVu Sans Mono",
        fontsize=FONT_SIZE,
        va="baseline",
        parse_math=False,  # a dollar sign is a dollar sign
    )


def _draw_scale(axes: Axes, colours: Any, num_hidden_layers: int) -> None:
    axes.imshow(
        [list(range(1, num_hidden_layers + 1))],
        aspect="auto",
        cmap=colours,
        extent=(0.5, num_hidden_layers + 0.5, 0, 1),
        interpolation="nearest",
    )
    axes.set_xticks(layer_ticks(num_hidden_layers))
    axes.set_yticks([])
    axes.tick_params(length=2.5, color=GREY, labelcolor=INK, labelsize=9)
    axes.set_xlabel("layer at which the token left", color=INK, fontsize=9, labelpad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _wrapped(pieces: Sequence[str]) -> list[list[tuple[int, str, int]]]:
    """Lines of (column, letters, token): broken between words, within a word only where it fills a line alone."""
    text = "".join(pieces)
    owners = [token for token, piece in enumerate(pieces) for _ in piece]
    lines: list[list[tuple[str, int]]] = [[]]  # (letter, token)
    for match in re.finditer(r"\n|[^\S\n]*\S+|[^\S\n]+", text):
        start, end = match.span()
        if text[start] == "\n":
            lines[-1].append(("↵", owners[start]))
            lines.append([])
            continue
        full = bool(lines[-1]) and len(lines[-1]) + end - start > COLUMNS
        if full:
            lines.append([])
        if full or start == 0:  # no indentation; after a line break of the text's own there may be one
            start += len(match[0]) - len(match[0].lstrip())
        for place in range(start, end):
            if len(lines[-1]) == COLUMNS:
                lines.append([])
            lines[-1].append((text[place] if text[place].isprintable() else " ", owners[place]))
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    wrapped: list[list[tuple[int, str, int]]] = []
    for line in lines:
        column = 0
        wrapped.append([])
        for token, letters in groupby(line, key=lambda pair: pair[1]):
            joined = "".join(letter for letter, _ in letters)
            wrapped[-1].append((column, joined, token))
            column += len(joined)
    return wrapped


def _runs(
    pieces: Sequence[str], exit_layers: Sequence[int], num_hidden_layers: int
) -> Iterator[tuple[str, int]]:
    """Text and layer of neighbours that left at one layer."""
    _check_tokens(pieces, exit_layers, num_hidden_layers)
    for layer, tokens in groupby(zip(pieces, exit_layers, strict=True), key=lambda token: token[1]):
        yield "".join(piece for piece, _ in tokens), layer


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


def _check_tokens(pieces: Sequence[str], exit_layers: Sequence[int], num_hidden_layers: int) -> None:
    if len(pieces) != len(exit_layers):
        raise ValueError(
            "pieces and exit_layers must be of equal length, "
            f"got {len(pieces)} and {len(exit_layers)}. Give one layer for each token."
        )
    for layer in exit_layers:
        _check_layer(layer, num_hidden_layers)


def _check_layer(exit_layer: int, num_hidden_layers: int) -> None:
    if not 1 <= exit_layer <= num_hidden_layers:
        raise ValueError(
            f"exit_layer must be from 1 to {num_hidden_layers}, got {exit_layer}. Layers count from 1."
        )
