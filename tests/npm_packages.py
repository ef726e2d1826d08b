"""Node.js and the npm packages of `tests/js`; tests that need what is not there are skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

JS = Path(__file__).parent / "js"


def npm_folder(*names: str) -> Path:
    """`node_modules`, with packages by their names in it."""
    for name in names:
        if not (JS / "node_modules" / name).is_dir():
            pytest.skip(f"needs the npm package {name} (npm install in tests/js, which `make test` does)")
    return JS / "node_modules"


def node() -> str:
    """Node's program, where ONNX Runtime Web is installed for it."""
    npm_folder("onnxruntime-web")
    return bare_node()


def bare_node() -> str:
    """Node's program."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js")
    return program
