"""The tables of `retrofit`: how fast each criterion is at an agreement, however many criteria there are."""

from __future__ import annotations

import io

from rich.console import Console, Group

from consistentee.evaluation.reports import agreement_tables
from consistentee.evaluation.results import AgreementEvaluation, AgreementPoint, OtherAgreement
from consistentee.functional.criteria import CRITERIA

CURVE = [
    AgreementPoint(0.1, 0.96, 1.0, 4.0),
    AgreementPoint(0.5, 0.99 - 1e-12, 2.0, 2.0),  # as a sum in another order gives it
    AgreementPoint(1.0, 1.0, 4.0, 1.0),
]
SLOW = OtherAgreement(None, None, [AgreementPoint(1.0, 0.98, 4.0, 1.0)])
EVALUATION = AgreementEvaluation(
    num_hidden_layers=4,
    num_examples=10,
    criterion="policy",
    threshold=0.5,
    metrics={"agreement": 0.99},
    mean_exit_layer=2.0,
    layer_speedup=2.0,
    layers_saved=0.5,
    exit_histogram=[0, 10, 0, 0],
    curve=CURVE,
    other_criteria=dict.fromkeys(CRITERIA[1:], SLOW),
    agreement=0.99,
    agreement_standard_error=0.01,
    exit_agreement=[None, 0.99, None, None],
    per_layer_agreement=[0.96, 0.99, 0.99, 1.0],
)


def test_a_row_for_each_criterion_with_its_fastest_point() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(Group(*agreement_tables(EVALUATION)))
    lines = console.file.getvalue().splitlines()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line.split()[:1] and line.split()[0] in CRITERIA
    }
    (policy,) = [line.split()[1:] for line in lines if line.startswith(" policy ") and ">" not in line]
    assert policy == ["1.00x", "1.00x", "2.00x", "2.00x", "4.00x"]
    del rows["policy"]
    assert rows == {key: ["1.00x", "1.00x"] for key in CRITERIA[1:]}  # at 98 and 95 %, nothing above
    (head,) = [" ".join(line.split()) for line in lines if "layer speed-up by" in line]
    assert head == "layer speed-up by at 99.9 % at 99.5 % at 99 % at 98 % at 95 %"
