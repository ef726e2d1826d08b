"""transformers' `pipeline("text-classification")` for our classifiers: texts are cut where the model ends.

transformers' own pipeline hands whole texts on unless it is called with `truncation=True`. That ends in an error beyond
the model's positions, and between them and the training's length in an answer that `Engine` does not give. Ours also
takes an exit rule, when it is made or called: `operating_point`, or `criterion` and `threshold`. A threshold that is
given alone, at a call, is one of the criterion that the pipeline was made with.
"""

from __future__ import annotations

from typing import Any

from transformers import TextClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from consistentee.models.configuration import EarlyExitConfig, EncoderClassifierConfig
from consistentee.models.operating_points import point_or_rule

TASK = "text-classification"


class CuttingTextClassificationPipeline(TextClassificationPipeline):
    """transformers' pipeline; texts of our models are cut as `Engine` cuts them, unless `truncation` is given."""

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        """Token ids of a text, or of a pair given as `{"text": ..., "text_pair": ...}`."""
        config = self.model.config
        if isinstance(config, EncoderClassifierConfig):
            limits = {"truncation": True, "max_length": config.max_input_length}
            tokenizer_kwargs = {**limits, **tokenizer_kwargs}
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _sanitize_parameters(
        self,
        function_to_apply: Any = None,
        top_k: Any = "",
        operating_point: str | None = None,
        criterion: str | None = None,
        threshold: float | None = None,
        **tokenizer_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before, during, after = super()._sanitize_parameters(function_to_apply, top_k, **tokenizer_kwargs)
        if any(value is not None for value in (operating_point, criterion, threshold)):
            config, name = self.model.config, str(self.model.name_or_path)
            if not isinstance(config, EarlyExitConfig):
                raise ValueError(
                    f'Model "{name}" has no exits: threshold, criterion and operating point must not be given.'
                )
            of_threshold_alone = operating_point is None and criterion is None
            points = config.operating_points
            criterion, threshold = point_or_rule(points, operating_point, criterion, threshold, name)
            during = {**during, "threshold": threshold}
            if not of_threshold_alone:  # else it is one of the criterion that the pipeline was made with
                during["criterion"] = criterion
        return before, during, after

    def _forward(self, model_inputs: Any, **rule: Any) -> Any:
        return super()._forward({**model_inputs, **rule})


def register_pipeline() -> None:
    """Let `pipeline("text-classification", ...)` take this one, which for all other models is transformers' own."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = CuttingTextClassificationPipeline
