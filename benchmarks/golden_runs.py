"""Whether two revisions give the same, bit by bit: tiny trainings, evaluations, predictions and texts on the CPU.

    python benchmarks/golden_runs.py --against main          # that revision against this tree; two to three minutes
    python benchmarks/golden_runs.py --json golden.json      # keep what this tree gives ...
    python benchmarks/golden_runs.py --against golden.json   # ... and compare with it later, on the same machine

Weights by name, training records, saved configurations, predictions, exit layers, evaluations, generated tokens: see
`golden_cases.py`, which runs on both sides (a revision's own copy of it is not used). Exit code 1 on a difference that
no table below accounts for. Figures depend on processor and versions: compare on one machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

RENAMED: dict[str, str] = {
    "config/prices": "config/layer_cost_mode",
    "config/price_warmup": "config/layer_cost_warmup",
}
"""Ends of a path that are called otherwise now: before -> now."""

STEPS = "curves have equal steps of depth for both tasks, and default thresholds are chosen on them"
MORE = "a new criterion"

EXPECTED: dict[str, str] = {
    "generator *record/config/consistent_learning_rate": "a setting that generation shares since 0.1.0",
    "classifier *predictions/*/confidence 0.*": "scores are the curve's own: one at the threshold does not exceed it",
    "classifier *predictions/*/entropy 0.*": "as for confidence",
    "classifier *curve": STEPS,
    "classifier *predictions/*/policy 0.*": STEPS,
    "classifier *predictions/*/saved/*": STEPS,
    "classifier *thresholds/*": STEPS,
    "classifier *saved_config/threshold": STEPS,
    "classifier *record/validation/*": STEPS,
    "classifier commands: *evaluation/*": STEPS,
    "classifier commands: predictions": STEPS,
    "classifier finetune: *evaluation/*": STEPS,
    "*record/method": "a new key of the record",
    "classifier *record/data/text_sketch": "a new key of the record",
    "classifier *saved_config/operating_points": "a new field of the configuration",
    "classifier *record/history/*/num_examples": "a new key of the record",
    "generator *record/policy/policy_input": "a new key of the record",
    "classifier *saved_config/original*": "a new field of the configuration",
    "classifier *saved_config/exits_only": "a new field of the configuration",
    "classifier *record/config/num_layers": "a new setting",
    "*record/config/threshold_margin": "a new setting; thresholds are shyer unless it is 0",
    "classifier *record/config/passes": "a new setting",
    "classifier *record/config/policy_texts": "a new setting",
    "*record/config/distillation": "a setting that is gone",
    "classifier auto: *": "policies read log-odds in place of nine signals",
    "classifier *confident_patience*": MORE,
    "classifier *similar_patience*": MORE,
    "classifier *expert_sum*": MORE,
    "classifier *energy*": MORE,
    "classifier *cap*": MORE,
    "classifier *calibrated_confidence*": MORE,
    "classifier *learnt_to_exit*": MORE,
    "classifier *temperatures*": MORE,
    "classifier *layer_weights*": MORE,
    "classifier *quantile*": MORE,
    "classifier *static*": MORE,
    "classifier final_loss: *": "the hardness comes from the loss for both tasks: its last bit",
}
"""Patterns of values that differ from what was, or are new or gone, on purpose: "case: path" -> why."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one order of every sum
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

Result = dict[str, Any]


def main() -> None:
    """Run the cases here and there, compare, and say what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", metavar="REVISION|FILE", help="a git revision, or a file that --json wrote"
    )
    parser.add_argument("--json", type=Path, help="write what this tree gives")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="only these")
    parser.add_argument("--most", type=int, default=20, help="differences to name for each case")
    options = parser.parse_args()
    if options.against is None and options.json is None:
        parser.error("Give --against, --json, or both.")
    before, now = results(options.against, options.cases)
    if options.json is not None:
        options.json.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if before is None:
        print(f"{len(now['values'])} values")
        return
    found = differences(before, now)
    on_purpose, unexpected = sort_out(found)
    for why, count in Counter(on_purpose.values()).items():
        print(f"{count} values differ on purpose: {why}")
    for line in [*skips(before, now), *described(unexpected, options.most)]:
        print(line)
    print(f"{len(now['values'])} values, {len(unexpected)} differ")
    sys.exit(1 if unexpected else 0)


def results(against: str | None, cases: Sequence[str]) -> tuple[Result | None, Result]:
    """What the cases give there, if that is asked for, and in this tree."""
    if against is None or Path(against).is_file():
        known = None if against is None else json.loads(Path(against).read_text(encoding="utf-8"))
        return known, run(ROOT, cases)
    with checkout(against) as tree, ThreadPoolExecutor() as pool:
        before, now = pool.map(lambda root: run(root, cases), (Path(tree), ROOT))
    return before, now


def checkout(revision: str) -> AbstractContextManager[str]:
    """A folder with the files of a revision, removed in the end."""
    folder = tempfile.TemporaryDirectory(prefix="golden-")
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision], capture_output=True)
    if archive.returncode:
        folder.cleanup()
        raise SystemExit(archive.stderr.decode().strip())
    subprocess.run(["tar", "-x", "-C", folder.name], input=archive.stdout, check=True)
    return folder


def run(root: Path, cases: Sequence[str]) -> Result:
    """What the cases give with the package of a tree, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, Path(__file__).with_name("golden_cases.py"), file, *cases]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(root / "src"), "HF_HOME": folder}
        subprocess.run(command, env=environment, cwd=folder, check=True)
        result = json.loads(file.read_text(encoding="utf-8"))
    if Path(result["source"]).resolve() != (root / "src/consistentee").resolve():
        raise SystemExit(f"The cases of {root} ran with the package in {result['source']}.")
    return result


def differences(before: Result, now: Result) -> dict[str, tuple[Any, Any]]:
    """Values that are not the same, or only on one side ("-" on the other), of the cases that both sides have."""
    skipped = {*before["skipped"], *now["skipped"]}
    old = {renamed(name): value for name, value in before["values"].items()}
    new = now["values"]
    both = {_case(name) for name in old} & {_case(name) for name in new}
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        pair = (old.get(name, "-"), new.get(name, "-"))
        same = json.dumps(pair[0]) == json.dumps(pair[1])  # as NaN is not equal to itself
        if not same and _case(name) in both - skipped:
            found[name] = pair
    return found


def renamed(name: str) -> str:
    """The path that a value has now."""
    for before, now in RENAMED.items():
        if name.endswith(f"/{before}"):
            return name.removesuffix(before) + now
    return name


def skips(before: Result, now: Result) -> list[str]:
    """Which cases were not compared, and why."""
    lines = [
        f"Not compared: {case}, which {side} does not know: {why}"
        for side, result in (("the other revision", before), ("this tree", now))
        for case, why in result["skipped"].items()
    ]
    names = [{*map(_case, result["values"]), *result["skipped"]} for result in (before, now)]
    return lines + [f"Not compared: {case}, on one side only" for case in sorted(names[0] ^ names[1])]


def sort_out(found: Mapping[str, tuple[Any, Any]]) -> tuple[dict[str, str], dict[str, tuple[Any, Any]]]:
    """The differences that are `EXPECTED`, with why, and the others."""
    on_purpose: dict[str, str] = {}
    for name in found:
        for pattern, why in EXPECTED.items():
            if fnmatchcase(name, pattern):
                on_purpose[name] = why
    return on_purpose, {name: pair for name, pair in found.items() if name not in on_purpose}


def described(found: Mapping[str, tuple[Any, Any]], most: int) -> list[str]:
    """Lines that name the differences, of every case the first few."""
    lines: list[str] = []
    counts: Counter[str] = Counter()
    for name, (old, new) in found.items():
        counts[_case(name)] += 1
        if counts[_case(name)] <= most:
            lines += [f"{name}", f"    before {json.dumps(old)}", f"    now    {json.dumps(new)}"]
    return lines + [f"{case}: {count} values differ" for case, count in counts.items()]


def _case(name: str) -> str:
    return name.split(": ", 1)[0]


if __name__ == "__main__":
    main()
