"""The table of generation tasks, and the prompts that published files hold in place of plain texts."""

from __future__ import annotations

import pytest

from consistentee.data.generation_tasks import (
    GENERATION_TASKS,
    Layout,
    get_generation_task,
    is_generation_task,
    parse_alpaca_prompt,
    plain_article,
)
from consistentee.data.tasks import TASKS
from consistentee.data.templates import ALPACA


def test_names_do_not_depend_on_case_and_punctuation() -> None:
    assert [get_generation_task(name).name for name in ("Alpaca", "X-Sum", "CNN/DM")] == [
        "alpaca",
        "xsum",
        "cnndm",
    ]
    assert get_generation_task("cnn_dailymail") is get_generation_task("CNN/DailyMail")
    assert get_generation_task("databricks-dolly-15k") is GENERATION_TASKS["dolly"]
    assert not any(is_generation_task(name) for name in TASKS)
    assert all(is_generation_task(name.upper()) for name in GENERATION_TASKS)


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r'"alpacca" is not known\. Did you mean "alpaca"\? Known tasks: alpaca, dolly'
    ):
        get_generation_task("alpacca")
    with pytest.raises(ValueError, match=r'"rte" is not known\. Known tasks: .* give the training and'):
        get_generation_task("rte")


def test_every_task_says_what_is_asked() -> None:
    for task in GENERATION_TASKS.values():
        assert all((layout.instruction is None) == bool(task.instruction) for layout in task.layouts)
        assert task.max_new_tokens < task.max_length
    with pytest.raises(ValueError, match="instruction or input must name a column, got neither"):
        Layout("summary")


@pytest.mark.parametrize("context", ["", "one\n\ntwo\n### three"])
def test_an_alpaca_prompt_is_taken_apart(context: str) -> None:
    prompt = ALPACA.render("Add these.\n\nAll of them.", context)
    assert parse_alpaca_prompt(prompt) == ("Add these.\n\nAll of them.", context)
    assert parse_alpaca_prompt(prompt + "\n") == ("Add these.\n\nAll of them.", context)


def test_what_is_no_alpaca_prompt_stays_as_it_is() -> None:
    for text in (
        "Add these.",
        "### Instruction: Add.",
        ALPACA.render("Add.") + " 3",
        "Now: " + ALPACA.render("A"),
    ):
        assert parse_alpaca_prompt(text) == (text, "")


def test_an_article_is_unwrapped() -> None:
    article = "It rained.\n\nSummarize the above article in 1 sentence. He said so.\nArticle: 2"
    for request in ("1 sentence.", "two sentences.\n", "3 sentences.\n\n"):
        text = f"###\nArticle: {article}\n\nSummarize the above article in {request}"
        assert plain_article(text) == article
    assert plain_article(article) == article
