"""Instructions with the responses that are expected, and how their rows are chosen and split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from consistentee.data.templates import Turn
from consistentee.errors import DataError


@dataclass(frozen=True)
class InstructionDataset:
    """Instructions with the responses that are expected.

    Args:
        instructions: One a row. Where it and the input are "", the reference is a text to learn as a whole.
        inputs: What the instruction is about, one a row; "" where it stands alone.
        references: The responses, one a row, none empty.
        source: Where the rows come from, for messages and records.
        history: The turns of the conversation before the instruction, one tuple a row; None where no row has any.
        conversations: Which conversation a row is of; rows of one are never split. None where every row stands alone.
    """

    instructions: list[str]
    inputs: list[str]
    references: list[str]
    source: str
    history: list[tuple[Turn, ...]] | None = None
    conversations: list[int] | None = None

    def __post_init__(self) -> None:
        counts = (len(self.instructions), len(self.inputs), len(self.references))
        if len(set(counts)) > 1:
            raise ValueError(f"instructions, inputs and references must be equally many, got {counts}.")

    def __len__(self) -> int:
        return len(self.references)

    def select(self, indices: Iterable[int]) -> InstructionDataset:
        """The rows with these indices, in their order."""
        rows = [int(index) for index in indices]
        instructions, inputs = [self.instructions[row] for row in rows], [self.inputs[row] for row in rows]
        history = None if self.history is None else [self.history[row] for row in rows]
        of = None if self.conversations is None else [self.conversations[row] for row in rows]
        references = [self.references[row] for row in rows]
        return InstructionDataset(instructions, inputs, references, self.source, history, of)

    def prompts(self) -> list[tuple[str, str, tuple[Turn, ...]]]:
        """Instruction, input and history of every row."""
        history = [()] * len(self) if self.history is None else self.history
        return list(zip(self.instructions, self.inputs, history, strict=True))

    def split(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Split the rows in two at random, as `split_rows` does; the answers of a conversation stay together."""
        if self.conversations is None:
            return split_rows(len(self), fraction, seed)
        names = sorted(set(self.conversations))
        _, held = split_rows(len(names), fraction, seed)
        is_held = {names[place] for place in held}
        places = enumerate(self.conversations)
        kept_rows, held_rows = [], []
        for row, name in places:
            (held_rows if name in is_held else kept_rows).append(row)
        return kept_rows, held_rows

    def max_samples(self, count: int | None, seed: int = 0) -> InstructionDataset:
        """At most `count` rows drawn at random; the rows keep their order.

        Args:
            count: The number of rows to keep, at least 1; None keeps all.
            seed: Same seed, same rows.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        if count is None or count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def split_rows(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows in two at random, both parts with at least one.

    Args:
        count: The number of rows, at least 2.
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Same seed, same split.

    Returns:
        Indices of the rows kept and of the rows held out, both ascending.

    Raises:
        DataError: Fewer than two rows.
        ValueError: A fraction outside (0, 1).

    Example:
        >>> kept, held = split_rows(10, fraction=0.2, seed=0)
        >>> len(kept), len(held)
        (8, 2)
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}.")
    if count < 2:
        raise DataError(f"Rows that are to be split: {count}.", remedy="Give at least two rows.")
    held = min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]).tolist(), np.sort(order[:held]).tolist()
