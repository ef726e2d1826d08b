"""The command `serve`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from consistentee.cli.kinds import GENERATORS, kind_of_model
from consistentee.cli.options import Flag
from consistentee.cli.terminal import at_least_one, say, usage
from consistentee.errors import UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    operating_point: str | None = None,
    max_queue: int = 512,
    deadline_ms: float = 10_000,
    token_file: Path | None = None,
    audit: float = 0.0,
    dtype: str = "float32",
    device: str = "auto",
    backend: str = "torch",
    workers: int | None = None,
    debug: Flag = False,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C; answers on their way go out first.

    Classifiers answer POST /predict as text-embeddings-inference does, text generators /v1/completions and
    /v1/chat/completions as OpenAI does. Beside them /health, /ready, /metrics (Prometheus) and /openapi.json.

    Args:
        model: Folder of a trained model, or its name on the hub.
        host: Address to listen on. Others than the loopback one are for networks that you trust, or with --token-file.
        port: To listen on; 0 takes a free one.
        operating_point: When texts exit, by a name that `consistentee calibrate` gave, or full-depth, or saved (the
            saved rule). Requests may name another. [default: saved]
        max_queue: Texts (prompts) accepted and not answered yet, at most; more are refused with 429.
        deadline_ms: A text that is not answered within this time is refused with 504. Generators: the first token.
        token_file: File whose content, 8 or more characters without spaces, every request must bear as "Authorization:
            Bearer ...".
        audit: Share of the texts that are compared with full depth after their answer went out. Where that proves that
            the certificate does not hold, the next safer operating point is taken. Classifiers only.
        dtype: Precision: float32, bfloat16, float16, or of classifiers int8.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        backend: What runs the layers of a classifier: torch or onnxruntime.
        workers: Processes that compute, each with a copy of the model and its share of the threads; one that dies is
            replaced, and its texts are computed anew. Classifiers only. [default: none, this process computes]
        debug: Show tracebacks and the messages of other libraries.
    """
    at_least_one(max_queue=max_queue, workers=workers)
    if not 0 <= port <= 65_535:
        raise UsageError(f"--port must be in [0, 65535], got {port}.")
    if not 0 <= audit <= 1:
        raise UsageError(f"--audit must be a share of the texts in [0, 1], got {audit:g}.")
    if not 0 < deadline_ms < float("inf"):
        raise UsageError(f"--deadline-ms must be above 0, got {deadline_ms:g}.")
    from consistentee.serving.app import read_token
    from consistentee.serving.requests import ServerLimits
    from consistentee.serving.server import HttpServer

    token = None if token_file is None else read_token(token_file, "--token-file")
    limits = ServerLimits(max_queue=max_queue, deadline_ms=deadline_ms)
    if kind_of_model(model) is GENERATORS:
        for name, value, default in (
            ("--operating-point", operating_point, None),
            ("--audit", audit, 0.0),
            ("--backend", backend, "torch"),
            ("--workers", workers, None),
        ):
            if value != default:
                raise UsageError(f'{name} goes with classifiers, and model "{model}" is a text generator.')
        app = _generator(model, limits, token, dtype, device)
    else:
        app = _classifier(
            model,
            {"device": device, "dtype": dtype, "backend": backend},
            workers,
            token=token,
            limits=limits,
            operating_point=operating_point,
            audit=audit,
        )
    if host not in LOOPBACK and token is None:
        sys.stderr.write(f"Whoever reaches {host} may ask this server, as there is no --token-file.\n")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    server = HttpServer(app, host=host, port=port)
    say(f"Serving {model} at {server.url}")
    server.run()


def _classifier(
    model: str, opened: dict[str, Any], workers: int | None, *, token: bytes | None, **how: Any
) -> Any:
    """Its application; keywords as of `ClassifierService`."""
    from consistentee.pipelines.classifier import Engine
    from consistentee.serving.classification import ClassifierService
    from consistentee.serving.predict_route import classifier_app
    from consistentee.serving.workers import ProcessComputing, WorkerModel

    if workers is None:
        engine, computing = Engine.from_pretrained(model, **opened), None
    else:  # this process tokenizes, and needs no weights
        engine = Engine.from_pretrained(model, device="meta")
        computing = ProcessComputing(WorkerModel(model, **opened), workers)
    service = usage(lambda: ClassifierService(engine, computing=computing, **how))
    service.warm_up()
    point = service.auditor.point
    if point.max_disagreement is None and service.auditor.share:
        say(
            f'Operating point "{point.name}" has no certificate of its disagreement with full depth: the audit shows '
            "bounds, and nothing is stepped back from. `consistentee calibrate MODEL --max-disagreement` makes one."
        )
    return classifier_app(service, token=token)


def _generator(model: str, limits: Any, token: bytes | None, dtype: str, device: str) -> Any:
    from consistentee.pipelines.generator import TextGenerator
    from consistentee.serving.completions import generator_app
    from consistentee.serving.generation import GeneratorService

    saved = GENERATORS.load(model, device=None if device == "auto" else device, dtype=dtype)
    return generator_app(GeneratorService(TextGenerator(saved), limits=limits), token=token)
