"""Texts that are too long, in the page of `export --format web`: cut where the engine cuts them."""

from __future__ import annotations

import itertools
import json
import subprocess
from importlib import resources

import pytest

from consistentee.data.tokenization import encode_texts
from npm_packages import bare_node
from tiny import NEGATIVE, NEUTRAL, POSITIVE, tiny_tokenizer

MOST = 9
LENGTHS = (1, 3, 4, 7, 8, 20)
PROGRAM = """
const { source, vocabulary, max_length, cutsLeft, rows } = JSON.parse(require("node:fs").readFileSync(0));
const body = source.slice(source.indexOf("const encode ="), source.indexOf("const runNow"));
const encode = new Function("about", `${body}; return encode;`)({ max_length });
const idsOf = (text) => text.split(" ").map((word) => vocabulary[word]);
const [begin, end] = [vocabulary["[CLS]"], vocabulary["[SEP]"]];
const tokenizer = {
  encode: (text, { add_special_tokens = true, text_pair = null } = {}) => {
    if (!add_special_tokens) return { ids: idsOf(text) };
    const first = [begin, ...idsOf(text), end];
    const second = text_pair === null ? [] : [...idsOf(text_pair), end];
    return { ids: [...first, ...second], token_type_ids: [...first.map(() => 0), ...second.map(() => 1)] };
  },
};
console.log(JSON.stringify(rows.map((row) => encode({ tokenizer, cutsLeft }, row))));
"""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
def test_cut_as_the_engine_cuts(side: str, pairs: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = side
    words = [word for word in (*POSITIVE, *NEGATIVE, *NEUTRAL) if word in tokenizer.get_vocab()]
    some = [" ".join(itertools.islice(itertools.cycle(words), length)) for length in LENGTHS]
    others = [" ".join(itertools.islice(itertools.cycle(words[::-1]), length)) for length in LENGTHS]
    rows = list(itertools.product(some, others)) if pairs else [(text,) for text in some]
    wanted, cut = encode_texts(rows, tokenizer, MOST)
    source = resources.files("consistentee.serving").joinpath("page/classifier_graph.js").read_text("utf-8")
    values = {
        "source": source,
        "vocabulary": tokenizer.get_vocab(),
        "max_length": MOST,
        "cutsLeft": side == "left",
        "rows": rows,
    }
    done = subprocess.run(
        [bare_node(), "-e", PROGRAM], input=json.dumps(values), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["ids"] for row in found] == [row["input_ids"] for row in wanted]
    assert [row["types"] for row in found] == [row["token_type_ids"] for row in wanted]
    assert [row["isCut"] for row in found] == cut
    assert set(cut) == {False, True}
