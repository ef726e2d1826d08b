"""The server as an application of Ray Serve: `serve run consistentee.serving.ray_serve:app_builder model=runs/sst2`.

Every replica holds the application of `consistentee serve`, with a queue, deadlines, an audit and metrics of its own:
two replicas with a `max_queue` of 512 accept 1,024 texts. Requests come through the HTTP proxy of Ray Serve.
"""

# Without the future import of annotations: Ray Serve takes the class of the builder's argument from its signature.

from pathlib import Path
from typing import Any

from consistentee.backbones.loading import read_config
from consistentee.errors import SettingError, require_choice, require_extra
from consistentee.models.loaded import DTYPES, LoadedClassifier, LoadedGenerator, load_model, model_kind
from consistentee.models.operating_points import FULL_DEPTH_POINT, SAVED_POINT, rule_at
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.generator import TextGenerator
from consistentee.pipelines.layouts import require_backend
from consistentee.serving.app import read_token
from consistentee.serving.classification import ClassifierService
from consistentee.serving.completions import generator_app
from consistentee.serving.generation import GeneratorService
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import ServerLimits

pydantic: Any = require_extra("ray", "pydantic")


class RayServeArgs(pydantic.BaseModel):
    """What `app_builder` takes; the first nine as of `consistentee serve`.

    Args:
        model: folder of a trained model, which every node must see under this name, or its name on the hub.
        operating_point, audit, backend: of a classifier only.
        max_queue, deadline_ms: of each replica.
        token_file: whose content requests must bear; every node must see it.
        dtype, device: as of `consistentee serve`.
        num_replicas: copies of the model.
        num_cpus, num_gpus: that Ray keeps free for a replica; it computes with as many threads as it has CPUs.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str
    operating_point: str | None = None
    max_queue: int = pydantic.Field(512, ge=1)
    deadline_ms: float = pydantic.Field(10_000, gt=0, allow_inf_nan=False)
    token_file: Path | None = None
    audit: float = pydantic.Field(0.0, ge=0, le=1)
    dtype: str = "float32"
    device: str = "auto"
    backend: str = "torch"
    num_replicas: int = pydantic.Field(1, ge=1)
    num_cpus: float = pydantic.Field(1, ge=0)
    num_gpus: float = pydantic.Field(0, ge=0)


def app_builder(args: RayServeArgs) -> Any:
    """An application for `serve run` and `serve.run`, with the endpoints of `consistentee serve`.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        OSError: there is no such model.
        ValueError: the token is none that could be sent, or an argument does not fit the model.
    """
    serve: Any = require_extra("ray", "ray.serve")
    token = None if args.token_file is None else read_token(args.token_file, "token_file")
    _check(args)  # raises here, not in a replica

    def build() -> Any:
        return _asgi_app(args, token)

    deployment = serve.deployment(
        name="consistentee",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        # More than the application accepts, so that it is the one that refuses, with 429 and Retry-After.
        max_ongoing_requests=2 * args.max_queue,
        graceful_shutdown_timeout_s=args.deadline_ms / 1000 + 10,
    )
    return deployment(serve.ingress(build)()).bind()


def _check(args: RayServeArgs) -> None:
    """Raise unless there is such a model and the arguments fit it; its device is the replica's affair."""
    is_generator = model_kind(args.model) is LoadedGenerator
    for name in ("operating_point", "audit", "backend") if is_generator else ():
        if getattr(args, name) != RayServeArgs.model_fields[name].default:
            raise SettingError(
                f'{name} goes with classifiers, and model "{args.model}" is a text generator. Leave it out.'
            )
    if is_generator:
        require_choice("dtype", args.dtype, tuple(DTYPES))
        return
    config = read_config(args.model, "Model")
    require_backend(config["encoder_config"]["model_type"], args.dtype, args.backend)
    if args.operating_point not in (None, FULL_DEPTH_POINT, SAVED_POINT):
        rule_at(config.get("operating_points"), args.operating_point, args.model)


def _asgi_app(args: RayServeArgs, token: bytes | None) -> Any:
    """The application of a replica."""
    limits = ServerLimits(max_queue=args.max_queue, deadline_ms=args.deadline_ms)
    device = None if args.device == "auto" else args.device
    if model_kind(args.model) is LoadedGenerator:
        saved = load_model(args.model, LoadedGenerator, device=device, dtype=args.dtype)
        return generator_app(GeneratorService(TextGenerator(saved), limits=limits), token=token)
    engine = Engine(
        load_model(args.model, LoadedClassifier, device=device), dtype=args.dtype, backend=args.backend
    )
    service = ClassifierService(engine, limits=limits, operating_point=args.operating_point, audit=args.audit)
    service.warm_up()
    return classifier_app(service, token=token)
