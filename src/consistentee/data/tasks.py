"""The tasks known by name, of both kinds: their columns, labels and instructions, and where their rows come from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

END_MARKER = "###eos_token###"
"""Some published files write the end of a response as this text; a tokenizer has its own token for it."""

_ALPACA_PROMPT = re.compile(
    r"(?:Below is an instruction [^\n]*\n+)?### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n+### Input:\n(?P<input>.*?))?\n+### Response:\s*",
    re.DOTALL,
)
_ARTICLE_HEAD = re.compile(r"\A###\s*Article:\s*")
_ARTICLE_TAIL = re.compile(r"\s*\n\s*Summarize the above article in [^\n]{1,20} sentences?\.\s*\Z")


class LabelColumns(NamedTuple):
    """Which columns of a file hold the text and the label."""

    text: tuple[str, ...]
    label: str

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there."""
        return (*self.text, self.label)


@dataclass(frozen=True)
class PromptColumns:
    """Which columns of a file hold what.

    Args:
        response: Column of the text to generate.
        instruction: Column of the instruction; None where the task has one instruction for all rows.
        input: Column of what the instruction is about. It may be empty, or missing, where there is an instruction.
        split_prompt: Takes the instruction column apart into instruction and input.
        clean_input: Takes what is no part of it from the input column.
    """

    response: str
    instruction: str | None = None
    input: str | None = None
    split_prompt: Callable[[str], tuple[str, str]] | None = None
    clean_input: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.instruction is None and self.input is None:
            raise ValueError("instruction or input must name a column, got neither.")

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that must be there."""
        prompt = self.instruction if self.instruction is not None else self.input
        return (str(prompt), self.response)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table of tasks.

    Args:
        name: The name used on the command line.
        hub_path: Repository on the hub; None where the task has no canonical home there.
        hub_config: Configuration of that repository; None where it has one only.
        evaluation_split: The hub's split that is reported; None where it has training rows only.
        evaluation_files: Local file names (without ending) of the evaluation set, the best first.
        evaluation_rows: Where there are training rows only, so many at their end are the evaluation rows; None where
            there must be a file of them.
        local_header: Column names of a local TSV file that has no header line; None where it has one.
        skip_broken_rows: Whether the published files hold a few broken rows, to be skipped with a warning.
        aliases: Other names by which the task goes.
        home: Where the files can be had when the hub has none.
    """

    name: str
    hub_path: str | None = None
    hub_config: str | None = None
    evaluation_split: str | None = None
    evaluation_files: tuple[str, ...] = ("test", "validation", "dev")
    evaluation_rows: int | None = None
    local_header: tuple[str, ...] | None = None
    skip_broken_rows: bool = False
    aliases: tuple[str, ...] = ()
    home: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task):
    """A task whose rows are texts, or pairs of texts, with labels.

    Args:
        text_columns: One column, or two for a pair, as the hub names them.
        label_names: Class names by index; None where they are learned from the training file.
        metrics: Names from `metrics.METRICS`, the headline metric first.
        label_column: The label's column, as the hub names it.
        local_columns: Columns of the task's usual local files; the hub's and the `text_a`/`text_b` names always work.
        label_values: How files write the classes, by index, besides their names; None means "0", "1", ...
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    label_column: str = "label"
    local_columns: tuple[LabelColumns, ...] = ()
    label_values: tuple[str, ...] | None = None

    @property
    def layouts(self) -> tuple[LabelColumns, ...]:
        """Every set of columns that a local file of this task may have, the most specific first."""
        generic = ("text_a", "text_b") if len(self.text_columns) == 2 else ("text",)
        hub = LabelColumns(self.text_columns, self.label_column)
        return tuple(dict.fromkeys((*self.local_columns, hub, LabelColumns(generic, "label"))))

    @property
    def label_aliases(self) -> dict[str, str]:
        """How files may write a label, to its class name; empty where the names are learned."""
        if self.label_names is None:
            return {}
        values = self.label_values or tuple(str(index) for index in range(len(self.label_names)))
        return dict(zip(values, self.label_names, strict=True))


@dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """A task whose rows are instructions with responses.

    Args:
        layouts: The sets of columns that the hub's and the usual local files have, the most specific first.
        instruction: The instruction of every row, where the files hold none.
        max_new_tokens: Usual limit of a generated response, in tokens.
    """

    layouts: tuple[PromptColumns, ...]
    instruction: str = ""
    max_new_tokens: int = 256
    evaluation_rows: int | None = 100
    skip_broken_rows: bool = True


def parse_alpaca_prompt(prompt: str) -> tuple[str, str]:
    r"""The instruction and the input inside a prompt in Alpaca's format.

    Args:
        prompt: The prompt; one in no such format is the instruction as it is.

    Returns:
        The instruction, and the input or "".

    Example:
        >>> parse_alpaca_prompt("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:")
        ('Add.', '1, 2')
    """
    found = _ALPACA_PROMPT.fullmatch(prompt)
    return (prompt, "") if found is None else (found["instruction"], found["input"] or "")


def plain_article(text: str) -> str:
    r"""An article without "###\nArticle: " before it and a request for a summary after it, as some files wrap it.

    Example:
        >>> plain_article("###\nArticle: It rained.\n\nSummarize the above article in 1 sentence.\n")
        'It rained.'
    """
    return _ARTICLE_TAIL.sub("", _ARTICLE_HEAD.sub("", text))


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

# The order in which the label file of github.com/jacoxu/StackOverflow numbers them, from 1.
_STACKOVERFLOW_TOPICS = (
    *("wordpress", "oracle", "svn", "apache", "excel", "matlab", "visual-studio", "cocoa", "osx", "bash"),
    *("spring", "hibernate", "scala", "sharepoint", "ajax", "qt", "drupal", "linq", "haskell", "magento"),
)


def _glue(
    name: str, text_columns: tuple[str, ...], label_names: tuple[str, ...], **others: Any
) -> ClassificationTask:
    usual = {"evaluation_split": "validation", "evaluation_files": ("dev", "validation")}
    return ClassificationTask(
        name=name,
        hub_path="nyu-mll/glue",
        hub_config=name,
        text_columns=text_columns,
        label_names=label_names,
        **usual | others,
    )


TASKS: dict[str, ClassificationTask | GenerationTask] = {
    task.name: task
    for task in (
        _glue("sst2", ("sentence",), ("negative", "positive")),
        _glue(
            "mrpc",
            _SENTENCES,
            ("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
            local_columns=(LabelColumns(("#1 String", "#2 String"), "Quality"),),
        ),
        _glue("rte", _SENTENCES, _ENTAILMENT),
        _glue("qnli", ("question", "sentence"), _ENTAILMENT),
        _glue(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            local_columns=(LabelColumns(("question1", "question2"), "is_duplicate"),),
            skip_broken_rows=True,
        ),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            evaluation_split="validation_matched",
            evaluation_files=("dev_matched", "validation_matched", "dev", "validation"),
            local_columns=(LabelColumns(_SENTENCES, "gold_label"),),
        ),
        _glue(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
            local_header=("source", "label", "mark", "sentence"),
        ),
        ClassificationTask(
            name="m-cid",
            text_columns=("text",),
            label_names=None,
            evaluation_files=("test", "dev", "validation"),
            home="https://github.com/fanolabs/NID_ACLARR2022 (data/mcid)",
        ),
        ClassificationTask(
            name="stackoverflow",
            text_columns=("text",),
            label_names=_STACKOVERFLOW_TOPICS,
            label_values=tuple(str(number) for number in range(1, 21)),
            evaluation_files=("test", "dev", "validation"),
            home="https://github.com/jacoxu/StackOverflow",
        ),
        GenerationTask(
            name="alpaca",
            layouts=(PromptColumns("output", "instruction", "input"),),
            hub_path="tatsu-lab/alpaca",
            evaluation_rows=500,
        ),
        GenerationTask(
            name="dolly",
            layouts=(
                PromptColumns("response", "instruction", "context"),
                PromptColumns("answer", "prompt", split_prompt=parse_alpaca_prompt),
            ),
            hub_path="databricks/databricks-dolly-15k",
            evaluation_rows=51,
            aliases=("databricks-dolly-15k", "dolly-15k"),
        ),
        GenerationTask(
            name="cnndm",
            layouts=(PromptColumns("highlights", input="article"),),
            hub_path="abisee/cnn_dailymail",
            hub_config="3.0.0",
            evaluation_split="test",
            instruction="Summarize the article in three or four sentences.",
            max_new_tokens=128,
            aliases=("cnn_dailymail",),
        ),
        GenerationTask(
            name="xsum",
            layouts=(
                PromptColumns("summary_gt", input="article", clean_input=plain_article),
                PromptColumns("summary", input="document"),
            ),
            hub_path="EdinburghNLP/xsum",
            evaluation_split="test",
            instruction="Summarize the article in one sentence.",
            max_new_tokens=64,
        ),
    )
}

SomeTask = TypeVar("SomeTask", bound=Task)


def plain_name(name: str) -> str:
    """A task's or folder's name without case and punctuation, so that "SST-2" and "sst2" are the same."""
    return "".join(character for character in name.lower() if character.isalnum())


def find_task(name: str) -> ClassificationTask | GenerationTask | None:
    """The task of that name or alias, None where there is none; case and punctuation do not matter.

    Example:
        >>> find_task("CNN/DailyMail").name, find_task("imdb")
        ('cnndm', None)
    """
    wanted = plain_name(name)
    return next(
        (task for task in TASKS.values() if wanted in map(plain_name, (task.name, *task.aliases))), None
    )


def get_task(name: str, kind: type[SomeTask] = ClassificationTask) -> SomeTask:
    """The task of that name.

    Args:
        name: A key of TASKS, or another name of the task; case and punctuation do not matter.
        kind: `ClassificationTask` or `GenerationTask`.

    Returns:
        Its row.

    Raises:
        ValueError: There is no such task of this kind; the message lists those there are.

    Example:
        >>> get_task("SST-2").label_names
        ('negative', 'positive')
    """
    task = find_task(name)
    if isinstance(task, kind):
        return task
    known = [task.name for task in TASKS.values() if isinstance(task, kind)]
    by_plain_name = {plain_name(task): task for task in known}
    close = difflib.get_close_matches(plain_name(name), by_plain_name, n=1)
    hint = f' Did you mean "{by_plain_name[close[0]]}"?' if close else ""
    what = "Task" if kind is ClassificationTask else "Generation task"
    raise ValueError(
        f'{what} "{name}" is not known.{hint} Known tasks: {", ".join(known)}. '
        "For data of your own, give the training and evaluation files instead."
    )


def is_generation_task(name: str) -> bool:
    """Whether the name is that of a task to generate.

    Example:
        >>> is_generation_task("CNN/DailyMail"), is_generation_task("sst2")
        (True, False)
    """
    return isinstance(find_task(name), GenerationTask)
