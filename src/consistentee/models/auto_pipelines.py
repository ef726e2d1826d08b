"""transformers' `pipeline("text-classification")` for our classifiers: texts are cut where the model ends.

transformers' own pipeline hands whole texts on unless it is called with `truncation=True`. That ends in an error beyond
the model's positions, and between them and the training's length in an answer that `Engine` does not give.
"""

from __future__ import annotations

from typing import Any

from transformers import TextClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from consistentee.models.configuration import EncoderClassifierConfig

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


def register_pipeline() -> None:
    """Let `pipeline("text-classification", ...)` take this one, which for all other models is transformers' own."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = CuttingTextClassificationPipeline
