"""The scripts behind the published figures, as modules; the files of figures; whether a page says what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results"


def script(name: str) -> ModuleType:
    """A script of `benchmarks/`, by its name without ending; what lies beside it can be imported by it."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def read(*names: str) -> Any:
    """A file of figures below `benchmarks/results`."""
    return json.loads(RESULTS.joinpath(*names).read_text(encoding="utf-8"))


def missing(page: str, *sentences: str) -> list[str]:
    """Those of the sentences that a page does not hold, whatever its line breaks."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    return [sentence for sentence in sentences if " ".join(sentence.split()) not in text]
