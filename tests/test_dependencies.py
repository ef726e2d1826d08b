"""What we take from other libraries: the lowest versions that are tried, and the private names that we lean on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers import PreTrainedModel

from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OPERATORS = ("torch.ops.mkldnn.", "torch.ops.onednn.", "torch.ops.quantized.")  # torch.ops.aten is documented


def test_what_is_tried_is_the_lowest_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tried: dict[str, set[Version]] = {}
    for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            tried.setdefault(canonicalize_name(pin.name), set()).add(
                Version(str(pin.specifier).removeprefix("=="))
            )
    extras = {name: needed for name, needed in project["optional-dependencies"].items() if name != "docs"}
    groups = [project["dependencies"], *extras.values()]  # no test runs what `docs` brings
    listed = [text for group in groups for text in group]
    lowest = {
        canonicalize_name(needed.name): Version(bound.version)
        for needed in map(Requirement, listed)
        for bound in needed.specifier
        if bound.operator == ">="
    }
    assert {canonicalize_name(Requirement(text).name) for text in listed} - {"consistentee"} == set(lowest)
    assert tried["torch"] == {Version("2.13.0")}  # earlier ones come with CUDA: see the file
    differing = {
        name: (str(bound), tried.get(name))
        for name, bound in lowest.items()
        if name != "torch" and bound not in tried.get(name, set())
    }
    assert not differing


def private_names(tree: ast.AST) -> Iterator[str]:
    """Attributes with a leading underscore, by access or by `getattr`, and operators of torch's own kernels."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, whole = node.attr, ast.unparse(node)
            if whole.startswith(OPERATORS) or re.match("_[a-z]", name):
                yield name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and re.match("_[a-z]", str(name.value)):
                yield str(name.value)


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives to its functions, classes, fields and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if ast.unparse(node.value) == "self" else ""


def overridden_names() -> set[str]:
    """Private methods of transformers that our models define anew."""
    ours = (EarlyExitForSequenceClassification, FullDepthForSequenceClassification, EarlyExitForCausalLM)
    return {
        name
        for model in ours
        for kind in model.__mro__
        if kind.__module__.startswith("consistentee")
        for name, value in vars(kind).items()
        if re.match("_[a-z]", name) and callable(value)
        if any(hasattr(base, name) for base in kind.__mro__ if base.__module__.startswith("transformers"))
    }


def test_private_names_are_those_of_the_list() -> None:
    assert hasattr(PreTrainedModel, "_init_weights")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    own = {name for tree in trees for name in own_names(tree)}
    used = {name for tree in trees for name in private_names(tree)} - own | overridden_names()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    (part,) = (part for part in section if part.startswith("Private names"))
    assert {name.split(".")[-1] for name in re.findall(r"`([\w.]+\.\w+)`", part)} == used
