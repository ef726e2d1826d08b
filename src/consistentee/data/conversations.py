"""Conversations: `messages` as chat APIs write them and `conversations` as ShareGPT does, checked turn by turn.

An answer is learned with all turns before it as its prompt, so that a conversation becomes one row for each answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from consistentee.data.parsing import quoted
from consistentee.data.tables import Table
from consistentee.data.templates import Turn

CONVERSATION_COLUMNS = ("messages", "conversations")
"""Columns that hold a list of turns, {"role": ..., "content": ...} or {"from": ..., "value": ...}."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Roles as files write them, and what they are."""

_EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def read_turns(table: Table, row: int, values: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns of a row's conversation: perhaps a system's, then a user's and an assistant's in turn.

    Args:
        table: For the messages of errors.
        row: The row's number.
        values: Its values by column.
        column: The column of the conversation.

    Returns:
        The turns up to the last answer; what a user says behind it is left out.

    Raises:
        DataError: A value that is no conversation, a role or an order of roles that is not known, an empty text, or no
            answer; the message names row and turn.
    """
    listed = table.value_of(row, values, column)
    if not isinstance(listed, (list, tuple)) or not listed:
        got = "an empty list" if isinstance(listed, (list, tuple)) else type(listed).__name__
        problem = f'Column "{column}" must hold a list of turns, got {got}.'
        raise table.error(row, problem, f"Write {_EXAMPLE}.")
    turns: list[Turn] = []
    for number, turn in enumerate(listed, start=1):
        role, text = _turn(table, row, column, number, turn)
        before = turns[-1][0] if turns else None
        wanted = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        if role not in wanted:
            problem = f'Turn {number} in column "{column}" is {_whose(role)}, {_behind(before)}.'
            remedy = f"Put {' or '.join(map(_whose, wanted))} there, or leave the turn out."
            raise table.error(row, problem, remedy)
        turns.append((role, text))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        problem = f'The conversation in column "{column}" has no answer of an assistant\'s to learn.'
        raise table.error(row, problem, f"Add one, or remove the {table.unit}.")
    return turns


def answers(turns: Sequence[Turn]) -> Iterator[tuple[tuple[Turn, ...], str, str]]:
    """Every answer of a conversation: the turns before its question, the question, the answer.

    Example:
        >>> list(answers([("user", "1?"), ("assistant", "1."), ("user", "2?"), ("assistant", "2.")]))
        [((), '1?', '1.'), ((('user', '1?'), ('assistant', '1.')), '2?', '2.')]
    """
    for place, (role, text) in enumerate(turns):
        if role == "assistant":
            yield tuple(turns[: place - 1]), turns[place - 1][1], text


def _turn(table: Table, row: int, column: str, number: int, turn: Any) -> Turn:
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if isinstance(turn, Mapping) and role_key in turn and text_key in turn:
            role = turn[role_key]
            if not isinstance(role, str) or role not in ROLES:
                problem = f'Turn {number} in column "{column}" has the role {role!r}.'
                remedy = f"Known roles: {quoted(ROLES)}. Leave the turn out, or give it one of these."
                raise table.error(row, problem, remedy)
            name = f"{column}, turn {number}"
            (text,) = table.texts_of(row, {name: joined_parts(turn[text_key])}, (name,))
            return ROLES[role], text
    problem = f'Turn {number} in column "{column}" has no role and content (or from and value).'
    raise table.error(row, problem, f"Write {_EXAMPLE}.")


def joined_parts(content: Any) -> Any:
    """The text of a content in parts, each on lines of its own, if all of them are text; any other content as it is."""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return content


def _whose(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role}'s"


def _behind(before: str | None) -> str:
    return "the first" if before is None else f"behind {_whose(before)}"
