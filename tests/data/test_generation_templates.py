"""Prompt templates: the built-in ones, the tokenizer's chat template, files, and their round trip through JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from consistentee.data.templates import ALPACA, PLAIN, PromptTemplate, prompt_template
from consistentee.errors import DataError
from tiny import tiny_tokenizer

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_alpaca_has_two_variants() -> None:
    template = prompt_template("alpaca", tiny_tokenizer())
    assert template.render("Add {these}.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1, 2\n\n### Response:"
    )
    assert template.render("Add {these}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Response:"
    )
    assert not template.holds_special_tokens


def test_plain_is_the_text_as_it_is() -> None:
    template = prompt_template("plain", tiny_tokenizer())
    assert [template.render("a {b}"), template.render("a", "c"), template.render("", "c")] == [
        "a {b}",
        "a\n\nc",
        "c",
    ]


def test_chat_is_the_tokenizers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    template = prompt_template("chat", chat_tokenizer)
    assert template.render("Add.", "1, 2") == "[user] Add.\n\n1, 2[SEP][assistant] "
    assert template.render("Add.") == "[user] Add.[SEP][assistant] "
    assert template.holds_special_tokens


def test_where_nothing_is_asked_there_is_no_prompt(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (ALPACA, PLAIN, prompt_template("chat", chat_tokenizer)):
        assert template.render("", "") == ""


def test_an_empty_question_keeps_what_was_said_before_it(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    before = [("system", "Be kind."), ("user", "a"), ("assistant", "b")]
    assert PLAIN.render("", "", before) == "Be kind.\n\nab\n\n"
    chat = prompt_template("chat", chat_tokenizer)
    assert chat.render("", "", before[:1]) == "[system] Be kind.[SEP][user] [SEP][assistant] "
    for template in (ALPACA, chat):
        text = "".join(text for text, _ in template.parts("", "", before))
        assert text == template.render("", "", before)
        assert "Be kind." in text


def test_auto_takes_chat_where_there_is_one(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    for spec in (None, "auto"):
        assert prompt_template(spec, chat_tokenizer).name == "chat"
        assert prompt_template(spec, tiny_tokenizer()) is ALPACA
    with pytest.raises(
        ValueError, match=r'chat template for prompt template "chat", got none\. Take "alpaca"'
    ):
        prompt_template("chat", tiny_tokenizer())


def test_a_file_with_two_variants(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.txt",
        "\ufeffQ: {instruction}\r\n({input}) {{x}}\r\nA:\r\n---\r\nQ: {instruction}\r\nA: \r\n",
    )
    template = prompt_template(path, tiny_tokenizer())
    assert template.name == "mine.txt"
    assert template.render("why", "sky") == "Q: why\n(sky) {x}\nA:"
    assert template.render("why") == "Q: why\nA: "


def test_a_file_with_one_variant(tmp_path: Path) -> None:
    template = prompt_template(
        str(write(tmp_path / "a", "Q: {instruction} {input}\nA:\n\n")), tiny_tokenizer()
    )
    assert [template.render("why", "sky"), template.render("why")] == ["Q: why sky\nA:\n", "Q: why \nA:\n"]
    template = prompt_template(
        write(tmp_path / "b", "Q: {instruction}\n--- \nno line of dashes: {instruction}"), tiny_tokenizer()
    )
    assert template.render("why") == "no line of dashes: why"
    template = prompt_template(write(tmp_path / "c", "Q: {instruction}\nA:"), tiny_tokenizer())
    assert template.render("why", "sky") == "Q: why\n\nsky\nA:"


@pytest.mark.parametrize(
    "text, message",
    [
        ("Q: {input}\nA:", r"t\.txt: The template has no \{instruction\}\. Put it where"),
        ("", r"has no \{instruction\} \(there is no text\)"),
        ("{instruction}\n---\n", r"has no \{instruction\} \(there is no text\)"),
        (
            "{instruction} {question}",
            r"The placeholder \{question\} is not known\. Known: \{instruction\} and",
        ),
        ("{instruction.__class__}", r"The placeholder \{instruction\.__class__\} is not known"),
        ("{instruction} {input!r}", r"The placeholder \{input!r\} is not known"),
        ("{instruction:>9}", r"The placeholder \{instruction:>9\} is not known"),
        ("{instruction} {}", r"The placeholder \{\} is not known"),
        (
            '{instruction} {"a"',
            r"Its braces are not paired: .*\. Write braces that are part of the text twice",
        ),
        ("{instruction}}", "Its braces are not paired"),
        ("{instruction}\n---\n{instruction}\n---\n", r"Variants separated by a line ---: 3\. Give one, or"),
        (
            "{instruction}\n---\n{instruction}{input}",
            r"second variant, for rows without an input, holds \{input\}",
        ),
    ],
)
def test_files_that_are_no_templates(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompt_template(write(tmp_path / "t.txt", text), tiny_tokenizer())


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r'alpacca: There is no prompt .* Did you mean "alpaca"\? Give one of auto, '
    ):
        prompt_template("alpacca", tiny_tokenizer())
    with pytest.raises(
        DataError, match=r"no\.txt: There is no prompt template or template file of this name\. Give"
    ):
        prompt_template(tmp_path / "no.txt", tiny_tokenizer())
    (tmp_path / "latin").write_bytes("{instruction} ü".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin, line 1: There are bytes that are not UTF-8"):
        prompt_template(tmp_path / "latin", tiny_tokenizer())


def test_json_round_trip(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    own = PromptTemplate("own.txt", "Q: {instruction}")
    for template in (ALPACA, PLAIN, own):
        assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    chat = prompt_template("chat", chat_tokenizer)
    assert chat.to_dict() == {"kind": "chat"}
    again = PromptTemplate.from_dict(chat.to_dict(), chat_tokenizer)
    assert again.render("a", "b") == chat.render("a", "b")
    with pytest.raises(ValueError, match='must have a chat template for prompt template "chat", got none'):
        PromptTemplate.from_dict({"kind": "chat"})
    with pytest.raises(
        ValueError, match=r"A saved prompt template must be of kind chat, .* got \{'kind': 'text'\}"
    ):
        PromptTemplate.from_dict({"kind": "text"})
    with pytest.raises(DataError, match=r"a: The template has no \{instruction\}"):
        PromptTemplate.from_dict({"kind": "text", "name": "a", "with_input": "b", "without_input": None})
    with pytest.raises(ValueError, match='with_input or tokenizer must be given for template "a", not both'):
        PromptTemplate("a")
