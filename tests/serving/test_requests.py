"""Requests to classify: the forms of text-embeddings-inference, and what is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from consistentee.errors import SettingError
from consistentee.serving.requests import RefusedRequest, ServerLimits, read_json, read_predict


def read(inputs: Any, pairs: bool | None = None, **more: Any) -> Any:
    return read_predict({"inputs": inputs, **more}, text_pairs=pairs, max_batch=3)


@pytest.mark.parametrize(
    "inputs, pairs, texts, is_batch",
    [
        ("a", None, [("a",)], False),
        (["a"], None, [("a",)], True),
        (["a", "b"], False, [("a",), ("b",)], True),
        (["a", "b"], True, [("a", "b")], False),
        ([["a"], ["b"]], False, [("a",), ("b",)], True),
        ([["a", "b"], ["c", "d"]], True, [("a", "b"), ("c", "d")], True),
    ],
)
def test_forms(inputs: Any, pairs: bool | None, texts: Any, is_batch: bool) -> None:
    request = read(inputs, pairs)
    assert (request.texts, request.is_batch) == (texts, is_batch)
    assert read(inputs, pairs, parameters={}).is_batch


@pytest.mark.parametrize(
    "values, status, message",
    [
        ({}, 422, "inputs must be given"),
        ({"inputs": []}, 422, "not empty"),
        ({"inputs": 3}, 422, "inputs must be a text"),
        ({"inputs": {"a": "b"}}, 422, "inputs must be a text"),
        ({"inputs": ["a", 3]}, 422, "Item 2"),
        ({"inputs": [["a", "b", "c"]]}, 422, "Item 1"),
        ({"inputs": [["a"], ["a", "b"]]}, 422, "got both"),
        ({"inputs": ["a"] * 4}, 413, "at most 3 texts"),
        ({"inputs": ["a", "a", "a", 3]}, 413, "at most 3 texts, got 4"),  # none is looked at
        ({"inputs": "a", "truncate": 1}, 422, "truncate must be true or false"),
        ({"inputs": "a", "threshold": True}, 422, "threshold must be a number"),
        ({"inputs": "a", "threshold": 10**400}, 422, "threshold must be a number that a float holds"),
        ({"inputs": "a", "operating_point": 1}, 422, "operating_point must be a string"),
        ({"inputs": "a", "template": "/etc/passwd"}, 422, '"template" is no field'),
        ({"inputs": "a", "parameters": {"top_k": 0}}, 422, "top_k must be at least 1"),
        ({"inputs": "a", "parameters": {"function_to_apply": "sigmoid"}}, 422, "function_to_apply"),
        ({"inputs": "a", "truncation_direction": "left"}, 422, "truncation_direction"),
        ({"inputs": ["\ud800", 1]}, 422, "Item 2"),
    ],
)
def test_refused(values: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(RefusedRequest, match=message) as caught:
        read_predict(values, text_pairs=None, max_batch=3)
    assert caught.value.status == status
    json.dumps(caught.value.message).encode("ascii")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_bodies_that_are_no_objects(body: bytes) -> None:
    with pytest.raises(RefusedRequest, match="must be") as caught:
        read_json(body)
    assert caught.value.status in (400, 422)


def test_values_that_are_nested_as_deep_as_they_can_be_read() -> None:
    """To be shown in a message they would have to be written, which takes more of the stack."""
    statuses: set[int] = set()
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        body = b'{"inputs": "a", "threshold": ' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises(RefusedRequest) as caught:
            read_predict(read_json(body), text_pairs=None, max_batch=3)
        statuses.add(caught.value.status)
    assert statuses == {400, 422}


def test_limits_are_above_zero() -> None:
    with pytest.raises(SettingError, match="deadline_ms must be above 0"):
        ServerLimits(deadline_ms=0)
