"""Keys and values of every layer, row and slot of a generation, in one tensor.

A slot is a column of the batch: prompts are padded on the left, so that all rows write to the same slot, until a
verification gives rows different lengths. Where rows come and go (`continuous`), each begins at slot 0. One tensor for
all layers lets the keys and values of many skipped layers be written at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DecoderCache:
    """Storage of keys and values.

    Args:
        num_layers, rows, num_key_value_heads, capacity, head_size: sizes.
        dtype, device: of the model.

    Attributes:
        storage: (layers, 2, rows, key/value heads, capacity, head size); 0 are keys, 1 values.
        keys, values: by layer, views (rows, heads, capacity, head size).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_key_value_heads: int,
        head_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros: a masked slot must hold a number, 0 x NaN would be NaN.
        self._use(
            torch.zeros(
                num_layers, 2, rows, num_key_value_heads, capacity, head_size, dtype=dtype, device=device
            )
        )

    @property
    def rows(self) -> int:
        """Rows that there is room for."""
        return self.storage.shape[2]

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.storage.shape[4]

    def reserve(self, slots: int, rows: int = 0) -> None:
        """Make room for so many slots, and rows; grows by half at least (rows double), so that growing is rare."""
        old, capacity = self.storage, self.capacity
        if slots <= capacity and rows <= self.rows:
            return
        shape = list(old.shape)
        if slots > capacity:
            shape[4] = max(slots, capacity + capacity // 2)
        if rows > self.rows:
            shape[2] = max(rows, 2 * self.rows)
        grown = torch.zeros(shape, dtype=old.dtype, device=old.device)
        grown[:, :, : self.rows, :, :capacity] = old
        self._use(grown)

    def copy_row(self, row: int, source: DecoderCache, source_row: int, first: int, tokens: int) -> None:
        """Take over so many slots of a row of this cache or another one, from the `first` on; they begin at 0 here."""
        kept = source.storage[:, :, source_row, :, first : first + tokens]
        self.storage[:, :, row, :, :tokens] = kept

    def remove_row(self, row: int, lengths: Sequence[int]) -> None:
        """Of rows with so many tokens, the last takes the place of this one; what that frees holds zeros again."""
        last = len(lengths) - 1
        if row < last:
            self.copy_row(row, self, last, 0, lengths[last])
            self.storage[:, :, row, :, lengths[last] : lengths[row]] = 0
        self.storage[:, :, last, :, : lengths[last]] = 0

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only, (kept,) int64, in this order."""
        self._use(self.storage.index_select(2, rows))

    def _use(self, storage: Tensor) -> None:
        self.storage = storage
        self.keys = list(storage[:, 0].unbind(0))
        self.values = list(storage[:, 1].unbind(0))
