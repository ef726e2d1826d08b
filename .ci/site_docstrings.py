"""How docstrings read on the site: their `Example:` is code, and the word before a source stands out."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes the text of docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Google's parser knows `Examples:` alone, and would take `>>>` in an `Example:` for a quotation."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(Sources?):(?= )", r"**\1:**", text, flags=re.MULTILINE)
