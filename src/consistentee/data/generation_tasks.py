"""The generation tasks known by name: where their rows come from, on the hub and in local files, and usual lengths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from consistentee.data.tasks import plain_name

END_MARKER = "###eos_token###"
"""Some published files write the end of a response as this text; a tokenizer has its own token for it."""

_ALPACA_PROMPT = re.compile(
    r"(?:Below is an instruction [^\n]*\n+)?### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n+### Input:\n(?P<input>.*?))?\n+### Response:\s*",
    re.DOTALL,
)
_ARTICLE_HEAD = re.compile(r"\A###\s*Article:\s*")
_ARTICLE_TAIL = re.compile(r"\s*\n\s*Summarize the above article in [^\n]{1,20} sentences?\.\s*\Z")


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
    r"""An article without the prompt that some published files wrap around it.

    Args:
        text: The article, with or without "###\nArticle: " before it and a request for a summary after it.

    Returns:
        The article alone.

    Example:
        >>> plain_article("###\nArticle: It rained.\n\nSummarize the above article in 1 sentence.\n")
        'It rained.'
    """
    return _ARTICLE_TAIL.sub("", _ARTICLE_HEAD.sub("", text))


@dataclass(frozen=True)
class Layout:
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


@dataclass(frozen=True)
class GenerationTask:
    """One row of the table of generation tasks.

    Args:
        name: The name used on the command line.
        layouts: The sets of columns that the hub's and the usual local files have, the most specific first.
        hub_path: Repository on the hub.
        hub_config: Configuration of that repository; None where it has one only.
        evaluation_split: The hub's split that is reported; None where it has training rows only.
        evaluation_files: How the names of local evaluation files begin, the best first.
        evaluation_rows: Where there are training rows only, this many at their end are the evaluation rows.
        instruction: The instruction of every row, where the files hold none.
        max_length: Usual number of tokens of a training row, prompt and response.
        max_new_tokens: Usual limit of a generated response, in tokens.
        aliases: Other names by which the task goes.
    """

    name: str
    layouts: tuple[Layout, ...]
    hub_path: str
    hub_config: str | None = None
    evaluation_split: str | None = None
    evaluation_files: tuple[str, ...] = ("test", "validation", "dev")
    evaluation_rows: int = 100
    instruction: str = ""
    max_length: int = 512
    max_new_tokens: int = 256
    aliases: tuple[str, ...] = ()


GENERATION_TASKS: dict[str, GenerationTask] = {
    task.name: task
    for task in (
        GenerationTask(
            "alpaca",
            (Layout("output", "instruction", "input"),),
            "tatsu-lab/alpaca",
            evaluation_rows=500,
        ),
        GenerationTask(
            "dolly",
            (
                Layout("response", "instruction", "context"),
                Layout("answer", "prompt", split_prompt=parse_alpaca_prompt),
            ),
            "databricks/databricks-dolly-15k",
            evaluation_rows=51,
            max_length=1024,
            aliases=("databricks-dolly-15k", "dolly-15k"),
        ),
        GenerationTask(
            "cnndm",
            (Layout("highlights", input="article"),),
            "abisee/cnn_dailymail",
            hub_config="3.0.0",
            evaluation_split="test",
            instruction="Summarize the article in three or four sentences.",
            max_length=1024,
            max_new_tokens=128,
            aliases=("cnn_dailymail",),
        ),
        GenerationTask(
            "xsum",
            (
                Layout("summary_gt", input="article", clean_input=plain_article),
                Layout("summary", input="document"),
            ),
            "EdinburghNLP/xsum",
            evaluation_split="test",
            instruction="Summarize the article in one sentence.",
            max_length=1024,
            max_new_tokens=64,
        ),
    )
}


def is_generation_task(name: str) -> bool:
    """Whether `get_generation_task` knows the name.

    Example:
        >>> is_generation_task("CNN/DailyMail"), is_generation_task("sst2")
        (True, False)
    """
    return plain_name(name) in _by_plain_name()


def get_generation_task(name: str) -> GenerationTask:
    """The generation task of that name.

    Args:
        name: A key of GENERATION_TASKS, or another name of the task; case and punctuation do not matter.

    Returns:
        Its row.

    Raises:
        ValueError: There is no such task; the message lists those there are.

    Example:
        >>> get_generation_task("XSum").max_new_tokens
        64
    """
    by_plain_name = _by_plain_name()
    if task := by_plain_name.get(plain_name(name)):
        return task
    close = difflib.get_close_matches(plain_name(name), by_plain_name, n=1)
    hint = f' Did you mean "{by_plain_name[close[0]].name}"?' if close else ""
    raise ValueError(
        f'Generation task "{name}" is not known.{hint} Known tasks: {", ".join(GENERATION_TASKS)}. '
        "For data of your own, give the training and evaluation files instead."
    )


def _by_plain_name() -> dict[str, GenerationTask]:
    return {
        plain_name(name): task for task in GENERATION_TASKS.values() for name in (task.name, *task.aliases)
    }
