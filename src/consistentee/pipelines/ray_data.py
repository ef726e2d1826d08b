"""A classifier in a pipeline of `ray.data`: a class for `map_batches`, one engine for each actor.

Ray itself is not imported here: what it hands over are columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from consistentee.errors import SettingError
from consistentee.pipelines.classifier import Engine, Prediction

PREDICTED_COLUMNS = ("label", "score", "exit_layer", "truncated")


class RayPredictor:
    """Predicts for batches of a `ray.data` Dataset; every actor of the pool opens the model once.

    All columns stay, in their order, and four are added: `label` (str, name of the class), `score` (float64, its
    probability at the exit layer, in [0, 1]), `exit_layer` (int64, layers executed, from 1) and `truncated` (bool,
    whether the input was cut). Rows stay in their order. The texts of a batch are one window of the engine (see
    `Engine`), so batches of about 1,024 rows are the fastest.

    Args:
        model: folder of a trained model, which every node must see under this name, or its name on the hub.
        text_columns: the column of the text (str), or the two columns of a pair.
        prefix: put before the names of the added columns, where the Dataset has columns of these names.
        batch_size: inputs that go through the model together (latency mode); None: all of a batch, layer by layer.
        threshold, criterion, operating_point: when inputs exit, as of `Engine.predict`; None takes the saved rule.
        device, dtype, backend: as of `Engine.from_pretrained`. An actor has as many threads as `num_cpus` says, and
            sees a GPU only with `num_gpus`.

    Raises:
        OSError: there is no such model.
        SettingError: no text columns, or more than two.
        ValueError: it is not a model of this library, or does not run so, or an exit rule does not fit.

    Example:
        >>> ds = ray.data.read_parquet("reviews")  # doctest: +SKIP
        >>> ds.map_batches(
        ...     RayPredictor,
        ...     fn_constructor_kwargs={"model": "runs/sst2", "text_columns": "review"},
        ...     batch_size=1024,
        ...     compute=ray.data.ActorPoolStrategy(size=4),
        ... ).write_parquet("labelled")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        text_columns: str | Sequence[str] = "text",
        prefix: str = "",
        batch_size: int | None = None,
        threshold: float | None = None,
        criterion: str | None = None,
        operating_point: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        backend: str = "torch",
    ) -> None:
        self.engine = Engine.from_pretrained(model, device=device, dtype=dtype, backend=backend)
        self._text_columns = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns)
        if len(self._text_columns) not in (1, 2) or len(set(self._text_columns)) < len(self._text_columns):
            given = ", ".join(map(repr, self._text_columns)) or "none"
            raise SettingError(
                f"text_columns must be the column of the text, or the two columns of a pair, got {given}."
            )
        self._added = [prefix + name for name in PREDICTED_COLUMNS]
        self._batch_size = batch_size
        self._rule = self.engine.rule(criterion, threshold, operating_point)

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns added.

        Args:
            batch: (rows,) arrays by column (`batch_format="numpy"`, Ray's default), or a `pyarrow.Table`.

        Raises:
            SettingError: a text column is missing, an added one is there already, or it is another format.
            ValueError: a text is empty, as of `Engine.predict`.
        """
        is_table = isinstance(batch, pa.Table)
        if not is_table and not isinstance(batch, Mapping):
            raise SettingError(f'batch_format must be "numpy" or "pyarrow", got {type(batch).__name__}.')
        columns: Any = batch  # arrays by name, or a table, which knows more
        self._check_columns(columns.column_names if is_table else list(columns))
        parts = [
            columns[name].to_pylist() if is_table else list(columns[name]) for name in self._text_columns
        ]
        texts = list(zip(*parts, strict=True))
        predictions = self.engine.predict_window(texts, batch_size=self._batch_size, rule=self._rule)
        added = dict(zip(self._added, _columns(predictions), strict=True))
        if not is_table:
            return {**columns, **added}
        for name, values in added.items():
            kind = pa.string() if values.dtype == object else None
            columns = columns.append_column(name, pa.array(values, kind))
        return columns

    def _check_columns(self, columns: Sequence[str]) -> None:
        for name in self._text_columns:
            if name not in columns:
                raise SettingError(
                    f'text_columns must be columns of the Dataset, got "{name}"; it has: {", ".join(columns)}.'
                )
        taken = [name for name in self._added if name in columns]
        if taken:
            raise SettingError(
                f'The Dataset has a column "{taken[0]}" already. Give a prefix for what is added, such as "predicted_".'
            )


def _columns(predictions: Sequence[Prediction]) -> list[np.ndarray[Any, Any]]:
    """(rows,) arrays in the order of `PREDICTED_COLUMNS`."""
    kinds = (object, np.float64, np.int64, np.bool_)
    return [
        np.array([getattr(prediction, name) for prediction in predictions], dtype=kind)
        for name, kind in zip(PREDICTED_COLUMNS, kinds, strict=True)
    ]
