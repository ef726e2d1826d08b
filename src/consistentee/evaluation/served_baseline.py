"""Plain `transformers` behind the same server, to compare with: padded batches of what waits, through all layers.

`python -m consistentee.evaluation.served_baseline MODEL` says where it listens and serves until it is ended.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Hashable, Sequence

import torch

from consistentee.evaluation.speed_classification import ARRIVAL_BATCH
from consistentee.evaluation.whole_models import transformers_model
from consistentee.inference.encoder.incremental_scores import IncrementalExitScores
from consistentee.inference.encoder.layer_pool import PoolAnswer, PoolRow
from consistentee.inference.threads import limit_threads
from consistentee.pipelines.classifier import Engine
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import ServerLimits
from consistentee.serving.server import HttpServer


class PaddedPool:
    """The first rows that wait, at most `ARRIVAL_BATCH`, as one padded batch through the backbone and the last head.

    Args:
        engine: whose model computes, in Hugging Face's own way.
    """

    def __init__(self, engine: Engine) -> None:
        self._predict, self._num_layers = transformers_model(engine.saved.model), engine.backend.num_layers
        self._waiting: deque[PoolRow] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, rows: Sequence[PoolRow], exit_scores: IncrementalExitScores | None) -> None:
        """Take rows in; nobody exits."""
        self._waiting.extend(rows)

    def drop(self, keys: Collection[Hashable]) -> None:
        """Forget rows."""
        gone = set(keys)
        self._waiting = deque(row for row in self._waiting if row.key not in gone)

    @torch.inference_mode()
    def step(self) -> tuple[list[PoolAnswer], int]:
        """One batch through all layers."""
        rows = [self._waiting.popleft() for _ in range(min(ARRIVAL_BATCH, len(self._waiting)))]
        if not rows:
            return [], 0
        logits = self._predict([row.tokens for row in rows])
        answers = [
            PoolAnswer(row.key, logit, self._num_layers) for row, logit in zip(rows, logits, strict=True)
        ]
        return answers, len(rows)


def serve_baseline(model: str) -> None:
    """Serve a model in this way on a free port of the loopback address, until SIGTERM."""
    limit_threads()
    engine = Engine.from_pretrained(model, device="cpu")
    service = ClassifierService(
        engine, limits=ServerLimits(), operating_point="full-depth", pool=lambda: PaddedPool(engine)
    )
    service.warm_up()
    server = HttpServer(classifier_app(service), host="127.0.0.1", port=0)
    sys.stdout.write(f"Serving {model} at {server.url}\n")
    sys.stdout.flush()
    server.run()


if __name__ == "__main__":
    serve_baseline(sys.argv[1])
