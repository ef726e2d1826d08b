"""Keys and values of every layer, row and slot of a generation, in one tensor.

A slot is a column of the batch: prompts are padded on the left, so that all rows write to the same slot, until a
verification gives rows different lengths. One tensor for all layers lets the keys and values of many skipped layers be
written at once.
"""

from __future__ import annotations

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
    def capacity(self) -> int:
        """Slots."""
        return self.storage.shape[4]

    def reserve(self, slots: int) -> None:
        """Make room for so many slots; grows by half at least, so that growing is rare."""
        if slots <= self.capacity:
            return
        old = self.storage
        shape = list(old.shape)
        shape[4] = max(slots, self.capacity + self.capacity // 2)
        grown = torch.zeros(shape, dtype=old.dtype, device=old.device)
        grown[..., : self.capacity, :] = old
        self._use(grown)

    def keep(self, rows: Tensor) -> None:
        """Keep these rows only, (kept,) int64, in this order."""
        self._use(self.storage.index_select(2, rows))

    def _use(self, storage: Tensor) -> None:
        self.storage = storage
        self.keys = list(storage[:, 0].unbind(0))
        self.values = list(storage[:, 1].unbind(0))
