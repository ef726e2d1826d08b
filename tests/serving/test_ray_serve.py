"""Arguments of the application of Ray Serve, which are held to the model before anything starts; Ray itself is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from consistentee.models.operating_points import save_operating_point
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_model

pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of itself


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A classifier with an operating point, and a text generator."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    classifier = tiny_model(root / "classifier", tiny_backbone(root / "backbone"))
    save_operating_point(classifier, "sure", {"criterion": "policy", "threshold": 0.9})
    return str(classifier), str(generator_folder(root / "generator"))


@pytest.mark.parametrize(
    "is_generator, values, message",
    [
        (False, {"operating_point": "nope"}, 'has no operating point "nope"; it has: sure'),
        (False, {"dtype": "nope"}, "dtype must be one of float32, bfloat16, float16, int8"),
        (False, {"backend": "nope"}, "backend must be one of torch, onnxruntime"),
        (
            False,
            {"dtype": "bfloat16", "backend": "onnxruntime"},
            "runs .* in float32 on cpu or cuda, got .* in bfloat16",
        ),
        (False, {"dtype": "auto"}, "dtype and backend must be named"),
        (True, {"operating_point": "sure"}, "operating_point goes with classifiers"),
        (True, {"audit": 0.1}, "audit goes with classifiers"),
        (True, {"backend": "onnxruntime"}, "backend goes with classifiers"),
        (True, {"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    folders: tuple[str, str], is_generator: bool, values: dict[str, Any], message: str
) -> None:
    from consistentee.serving.ray_serve import RayServeArgs, app_builder

    with pytest.raises(ValueError, match=message):
        app_builder(RayServeArgs(model=folders[is_generator], **values))


def test_what_fits_is_taken(folders: tuple[str, str]) -> None:
    from consistentee.serving.ray_serve import RayServeArgs, app_builder

    for point in (None, "sure", "saved", "full-depth"):
        assert app_builder(RayServeArgs(model=folders[0], operating_point=point, audit=0.1)) is not None
    assert app_builder(RayServeArgs(model=folders[1], dtype="bfloat16")) is not None
