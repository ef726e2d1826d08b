"""The table of tasks, and the prompts that published files hold in place of plain texts."""

from __future__ import annotations

import pytest

from consistentee.data.tasks import (
    TASKS,
    ClassificationTask,
    GenerationTask,
    PromptColumns,
    find_task,
    get_task,
    is_generation_task,
    parse_alpaca_prompt,
    plain_article,
)
from consistentee.data.templates import ALPACA
from consistentee.functional.metrics import METRICS

CLASSIFICATION = [name for name, task in TASKS.items() if isinstance(task, ClassificationTask)]
GENERATION = [name for name, task in TASKS.items() if isinstance(task, GenerationTask)]


def test_every_task_of_the_paper_is_there() -> None:
    assert {"sst2", "mrpc", "rte", "qnli", "qqp", "mnli", "m-cid", "stackoverflow"} <= set(TASKS)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_rows_are_complete(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert len(task.text_columns) in (1, 2)
    assert task.metrics
    assert set(task.metrics) <= set(METRICS)
    assert all(len(layout.text) == len(task.text_columns) for layout in task.layouts)
    assert task.label_names is None or len(task.label_aliases) == len(task.label_names) >= 2
    assert (task.hub_path is None) == (task.hub_config is None) == (task.home is not None)
    if "f1" in task.metrics:
        assert len(task.label_names) == 2


@pytest.mark.parametrize("name", GENERATION)
def test_every_task_says_what_is_asked(name: str) -> None:
    task = TASKS[name]
    assert all((layout.instruction is None) == bool(task.instruction) for layout in task.layouts)
    assert task.evaluation_rows
    with pytest.raises(ValueError, match="instruction or input must name a column, got neither"):
        PromptColumns("summary")


@pytest.mark.parametrize(
    "name, found",
    [
        ("SST-2", "sst2"),
        ("sst2", "sst2"),
        ("Sst_2", "sst2"),
        ("Alpaca", "alpaca"),
        ("X-Sum", "xsum"),
        ("CNN/DM", "cnndm"),
        ("cnn_dailymail", "cnndm"),
        ("CNN/DailyMail", "cnndm"),
        ("databricks-dolly-15k", "dolly"),
    ],
)
def test_names_are_found_whatever_their_spelling(name: str, found: str) -> None:
    assert find_task(name) is get_task(name, type(TASKS[found])) is TASKS[found]
    assert is_generation_task(name) == (found in GENERATION)


def test_canonical_label_order() -> None:
    assert TASKS["rte"].label_aliases == {"0": "entailment", "1": "not_entailment"}
    assert TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert TASKS["stackoverflow"].label_aliases["1"] == "wordpress"
    assert TASKS["stackoverflow"].label_aliases["20"] == "magento"
    assert "0" not in TASKS["stackoverflow"].label_aliases


@pytest.mark.parametrize(
    "name, kind, message",
    [
        (
            "stackoverflw",
            ClassificationTask,
            r'Task "stackoverflw" is not known\. Did you mean "stackoverflow"\?',
        ),
        ("imdb", ClassificationTask, "Known tasks: sst2, mrpc, rte"),
        (
            "alpacca",
            GenerationTask,
            r'"alpacca" is not known\. Did you mean "alpaca"\? Known tasks: alpaca, dolly',
        ),
        ("rte", GenerationTask, r'"rte" is not known\. Known tasks: .* give the training and'),
        ("xsum", ClassificationTask, r'Task "xsum" is not known'),
    ],
)
def test_unknown_task_lists_the_known_ones(name: str, kind: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(name, kind)


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
