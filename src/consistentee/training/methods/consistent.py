"""ConsistentEE, top to bottom: warm-up, then policy and classifiers in turn until nothing is gained.

    phase 1  warm-up      backbone and exits on the layer-weighted sum of the exits' losses
    phase 2  policy       fitted on cached states; judged on instances nobody has trained on
    phase 3  consistent   backbone and exits on the loss at the exit layer
    phases 2 and 3 repeat; of the rounds that validation finds no worse the last is kept, then thresholds are chosen
    unlabelled texts      where there are any: exits go on learning the last layer's answers, the policy has more rows
                          to learn from; kept if validation finds that no worse

Rows take the expected loss over the exit distribution; tokens draw their exits, since what a token leaves behind when
it exits is what later ones attend to.

Source: ConsistentEE (AAAI 2024, arXiv:2312.11882). Differences: the exact policy gradient by default, a policy on
held-out instances (cross-fitted), some weighted sum kept in phase 3, one learning-rate schedule over all phases; for
tokens also a share of its own for the last layer, a few layers a step, and any `exit_head`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consistentee.training import warm_ups
from consistentee.training.cached_states import CachedStates
from consistentee.training.policy_phase import (
    PolicyPhase,
    finish_run,
    install_choice,
    is_no_worse,
    record_round,
    run_policy_phase,
)
from consistentee.training.run import Run
from consistentee.training.tasks.unlabelled import UnlabelledTraining


def train_consistent(run: Run) -> Path:
    """Train by the three phases and save."""
    config, task, progress = run.config, run.task, run.progress
    warm_up_steps, round_steps = run.steps_of(config.warmup_epochs), run.steps_of(config.consistent_epochs)

    # Phase 1: every exit learns every instance, deeper layers weigh more.
    def at_stop() -> None:
        task.observe(run)
        run.checkpoint()

    stops = task.warm_up_stops(run, warm_up_steps)
    warm_ups.take_steps(run, task.weighted_sum(), stops, phase="warm-up", at_stop=at_stop)

    # Phases 2 and 3, in turn.
    phase: PolicyPhase | None = None
    while not progress["training_done"]:
        number = progress["rounds_done"]
        if not progress["policy_fitted"]:
            # Phase 2: with everything else frozen, the policy learns when to exit.
            phase = run_policy_phase(run, f"round {number} policy")
            record_round(run, number, phase)
            progress["policy_fitted"] = True
            stale = number - progress["best_round"] >= config.patience
            progress["training_done"] = stale or number == config.rounds or round_steps == 0
            if stale and number < config.rounds:
                run.say(f"Stopped early: {config.patience} rounds in turn with a worse validation score.")
            run.checkpoint()
        if not progress["training_done"]:
            # Phase 3: an instance's loss comes from where it exits.
            run.take_steps(
                warm_up_steps + (number + 1) * round_steps,
                task.consistent(),
                phase=f"round {number + 1} consistent",
                learning_rate=config.consistent_learning_rate,
            )
            progress.update(rounds_done=number + 1, policy_fitted=False)
            run.checkpoint()

    if isinstance(task, UnlabelledTraining):
        return finish_run(run, _learn_from_texts(run, task, phase))
    return finish_run(run, _kept_round(run, phase))


def _kept_round(run: Run, phase: PolicyPhase | None) -> PolicyPhase:
    """The kept round's weights, policy and thresholds; they are still here if it was the last."""
    if phase is None or not phase.complete or run.progress["best_round"] != run.progress["rounds_done"]:
        run.load_best()
        phase = run_policy_phase(run, "final policy", try_all=True)
    return phase


def _learn_from_texts(run: Run, task: UnlabelledTraining, phase: PolicyPhase | None) -> PolicyPhase:
    """Let exits and policy learn from texts without labels; what the rounds left is kept where that is better."""
    found: dict[str, Any] | None = run.progress["unlabelled"]
    before: PolicyPhase | None = None
    if found is None:  # else the run was resumed in here
        before = _kept_round(run, phase)
        score, hits = before.choice.report.score, before.choice.hits.tolist()
        found = run.progress["unlabelled"] = {"score_before": score, "hits_before": hits}

    steps = task.exit_steps(run)
    run.begin_stage(steps)
    if before is not None:
        run.checkpoint()
    if steps.step < steps.total_steps:
        if isinstance(rows := steps.rows, CachedStates):
            rows.load_for(steps.step, shown=run.accelerator.is_main_process)
        run.take_steps(steps.total_steps, task.agreement(), phase="exits on unlabelled texts")
        run.checkpoint()
    after = run_policy_phase(run, "policy with unlabelled texts", try_all=True)
    run.stage = None

    kept = is_no_worse(after.choice, found["score_before"], found["hits_before"])
    found.update(score_after=after.choice.report.score, kept=kept)
    run.say(
        f"With unlabelled texts: validation score {found['score_after']:.4f}, without {found['score_before']:.4f}. "
        + ("Kept." if kept else "Worse by more than a standard error: exits and policy stay as they were.")
    )
    if kept:
        return after
    run.load_best()
    if before is None:
        return run_policy_phase(run, "final policy", try_all=True)
    install_choice(run, before.choice)
    return before
