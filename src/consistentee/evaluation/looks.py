"""Colours and line styles of pictures."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette: told apart under every common colour blindness, and by line style without colour. Then the
# darker ones of Tol's muted scheme, for what is more than seven.
INK, GREY, GRID = "#222222", "#777777", "#E3E3E3"
BLUE, RED, GREEN, PINK, BAR = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A9CCE3"
ORANGE, SKY = "#E69F00", "#56B4E9"
WINE, TEAL, OLIVE, PURPLE, INDIGO, BROWN = "#882255", "#44AA99", "#999933", "#AA4499", "#332288", "#661100"
LOOKS: dict[str, tuple[str, Any]] = {
    "policy": (BLUE, "-"),
    "confidence": (RED, "--"),
    "entropy": (GREEN, "-."),
    "patience": (PINK, ":"),
    "confident_patience": (ORANGE, (0, (6, 1, 1, 1, 1, 1))),
    "similar_patience": (SKY, (0, (3, 1))),
    "expert_sum": (WINE, (0, (8, 3))),
    "energy": (TEAL, (0, (1, 1))),
    "cap": (OLIVE, (0, (8, 3, 1, 3))),
    "calibrated_confidence": (INDIGO, (0, (2, 1))),
    "learnt_to_exit": (PURPLE, (0, (8, 1, 1, 1))),
    "quantile": (BROWN, (0, (5, 1, 1, 1))),
    "softmax_margin": (RED, "--"),
    "state_similarity": (GREEN, "-."),
    "confidence_classifier": (PINK, ":"),
    "static": (GREY, (0, (1, 3))),
}
"""Colour and line style of each criterion; no two of one task share a colour."""
