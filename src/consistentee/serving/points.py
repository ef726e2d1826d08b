"""The operating points that a server knows, with what their certificates promise, and which one is safer.

Beside the model's own there are `full-depth`, where nobody exits, and `saved`, the model's saved rule. Where one of its
operating points is the same, that one is listed in place of `saved`, which stays another name of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consistentee.errors import SettingError
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.operating_points import FULL_DEPTH_POINT, SAVED_POINT
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedPoint:
    """An operating point.

    Args:
        name: by which requests name it.
        rule: when texts exit.
        max_disagreement: share of texts that may get another class than at full depth, by its certificate; None where
            it has none about that.
        confidence: of the certificate.
    """

    name: str
    rule: ExitRule
    max_disagreement: float | None = None
    confidence: float | None = None


def served_points(engine: Engine) -> dict[str, ServedPoint]:
    """All points of a model by name, its saved rule first; one of the model's with a name of ours is left out."""
    model = engine.saved.model
    if not isinstance(model, EarlyExitForSequenceClassification):
        return {FULL_DEPTH_POINT: ServedPoint(FULL_DEPTH_POINT, ExitRule.full_depth(), 0.0, 1.0)}
    # Nobody exits by it, and unlike `ExitRule.full_depth` earlier classifiers keep their share in the last prediction.
    nobody = ExitRule("confidence", EXIT_CRITERIA["confidence"].thresholds.high)
    full = ServedPoint(FULL_DEPTH_POINT, nobody, 0.0, 1.0)
    known: dict[str, Mapping[str, Any]] = dict(model.config.operating_points or {})
    for name in (FULL_DEPTH_POINT, SAVED_POINT):
        if known.pop(name, None) is not None:
            _log.warning(
                'The operating point "%s" of model "%s" is not served: the server\'s own has this name. Calibrate it '
                "anew under another one.",
                name,
                engine.saved.name,
            )
    points = {
        name: ServedPoint(name, engine.rule(operating_point=name), *_promise(entry.get("certificate") or {}))
        for name, entry in known.items()
    }
    saved = engine.rule()
    same = [name for name, point in points.items() if point.rule == saved]
    first = {same[0]: points[same[0]]} if same else {SAVED_POINT: ServedPoint(SAVED_POINT, saved)}
    return {**first, FULL_DEPTH_POINT: full, **points}


def _promise(certificate: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Disagreement that a certificate allows, and with which confidence; one about another model says nothing here."""
    if certificate.get("reference") is not None:
        return None, None
    goal = certificate.get("goal")
    # The bound of a threshold that was chosen for its speed is one of disagreement with full depth as well.
    allowed = {"max_disagreement": "target", "min_speedup": "bound"}.get(str(goal))
    if allowed is None or certificate.get(allowed) is None:
        return None, None
    return float(certificate[allowed]), float(certificate.get("confidence", 0.95))


def named_point(points: Mapping[str, ServedPoint], name: str | None, model: str) -> ServedPoint:
    """A point by name; None is the first, and so is `saved`, whatever it is called.

    Raises:
        SettingError: there is none of this name.
    """
    if name is None or name == SAVED_POINT:
        return next(iter(points.values()))
    if name not in points:
        raise SettingError(
            f'Model "{model}" has no operating point "{name[:80]}"; it has: {", ".join(points)}.'
        )
    return points[name]


def safer_point(points: Mapping[str, ServedPoint], point: ServedPoint) -> ServedPoint:
    """The next higher threshold of the same criterion, by which nobody exits earlier; else full depth."""
    higher = [
        other
        for other in points.values()
        if other.rule.criterion == point.rule.criterion and other.rule.threshold > point.rule.threshold
    ]
    return min(higher, key=lambda other: other.rule.threshold, default=points[FULL_DEPTH_POINT])
