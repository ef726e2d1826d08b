"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from consistentee.errors import require_extra

LATENCY_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """The counters of one server, in a registry of their own.

    Args:
        num_layers: of the model; exits are counted for each.
        model: its name.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, num_layers: int, model: str) -> None:
        client: Any = require_extra("serve", "prometheus_client")
        self._client = client
        self.registry: Any = client.CollectorRegistry()
        layers = tuple(range(1, num_layers + 1))
        self.model = self._make(client.Info, "model", "The model that is served.")
        self.model.info({"name": model, "layers": str(num_layers)})
        self.requests = self._make(client.Counter, "requests", "Requests answered.", ("route", "status"))
        self.seconds = self._make(
            client.Histogram,
            "request_seconds",
            "From a request's head to its answer's end.",
            ("route",),
            LATENCY_BUCKETS,
        )
        self.in_queue = self._make(client.Gauge, "queue", "Texts accepted and not answered yet.")
        self.waited = self._make(
            client.Histogram,
            "answer_seconds",
            "From a text's acceptance to its answer (generators: to its first token).",
            (),
            LATENCY_BUCKETS,
        )
        self.batch_rows = self._make(
            client.Histogram,
            "batch_rows",
            "Rows that passed a layer (generators: all layers) together.",
            (),
            ROW_BUCKETS,
        )
        self.exit_layers = self._make(
            client.Histogram, "exit_layer", "Layer at which a text or token exited.", (), layers
        )
        self.point = self._make(
            client.Gauge, "operating_point", "1 for the operating point in force.", ("operating_point",)
        )
        self.promised = self._make(
            client.Gauge,
            "certificate_max_disagreement",
            "Share of texts that may differ from full depth, by the strictest certificate that was in force.",
            ("operating_point",),
        )
        self.confidence = self._make(
            client.Gauge, "certificate_confidence", "Of that certificate.", ("operating_point",)
        )
        self.audited = self._make(
            client.Counter, "audited", "Texts compared with full depth.", ("operating_point",)
        )
        self.disagreed = self._make(
            client.Counter, "audit_disagreements", "Texts that differed from it.", ("operating_point",)
        )
        self.lower = self._make(
            client.Gauge,
            "audit_disagreement_lower",
            "Lower confidence bound of the disagreement, valid at all times.",
            ("operating_point",),
        )
        self.upper = self._make(
            client.Gauge, "audit_disagreement_upper", "Upper bound of the same.", ("operating_point",)
        )
        self.steps_back = self._make(
            client.Counter, "audit_steps_back", "Operating points left because their bound was broken."
        )
        self.failures = self._make(client.Counter, "failures", "Batches that failed.")
        self.workers = self._make(client.Gauge, "workers", "Worker processes that are ready.")
        self.worker_restarts = self._make(
            client.Counter, "worker_restarts", "Worker processes begun in place of one that died."
        )

    def _make(
        self,
        kind: Any,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] | None = None,
    ) -> Any:
        given: dict[str, Any] = {} if buckets is None else {"buckets": buckets}
        return kind(f"consistentee_{name}", text, labels, registry=self.registry, **given)

    def follow_queue(self, count: Callable[[], float]) -> None:
        """Ask this for the queue's length whenever somebody reads it."""
        self.in_queue.set_function(count)

    def follow_workers(self, count: Callable[[], float]) -> None:
        """Ask this for the number of worker processes whenever somebody reads it."""
        self.workers.set_function(count)

    def set_point(self, name: str, max_disagreement: float | None, confidence: float | None) -> None:
        """Another operating point is in force."""
        for gauge in (self.point, self.promised, self.confidence, self.lower, self.upper):
            gauge.clear()
        self.point.labels(name).set(1)
        if max_disagreement is not None:
            self.promised.labels(name).set(max_disagreement)
        if confidence is not None:
            self.confidence.labels(name).set(confidence)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return self._client.generate_latest(self.registry)
