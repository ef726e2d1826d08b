"""ConsistentEE, top to bottom: warm-up, then policy and classifiers in turn until nothing is gained.

    phase 1  warm-up      backbone and exits on the layer-weighted sum of the exits' losses
    phase 2  policy       fitted on cached states; judged on instances nobody has trained on
    phase 3  consistent   backbone and exits on the loss at the exit layer
    phases 2 and 3 repeat; of the rounds that validation finds no worse the last is kept, then thresholds are chosen

Rows take the expected loss over the exit distribution; tokens draw their exits, since what a token leaves behind when
it exits is what later ones attend to.

Source: ConsistentEE (AAAI 2024, arXiv:2312.11882). Differences: the exact policy gradient by default, a policy on
held-out instances (cross-fitted), some weighted sum kept in phase 3, one learning-rate schedule over all phases; for
tokens also a share of its own for the last layer, a few layers a step, and any `exit_head`.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.policy_phase import PolicyPhase, finish_run, record_round, run_policy_phase
from consistentee.training.run import Run


def train_consistent(run: Run) -> Path:
    """Train by the three phases and save."""
    config, task, progress = run.config, run.task, run.progress
    warm_up_steps, round_steps = run.steps_of(config.warmup_epochs), run.steps_of(config.consistent_epochs)

    # Phase 1: every exit learns every instance, deeper layers weigh more.
    for stop in task.warm_up_stops(run, warm_up_steps):
        if run.steps.step < stop:
            run.take_steps(stop, task.weighted_sum(), phase="warm-up")
            task.observe(run)
            run.checkpoint()

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

    # The kept round's weights, policy and thresholds; they are still here if it was the last.
    if phase is None or not phase.complete or progress["best_round"] != progress["rounds_done"]:
        run.load_best()
        phase = run_policy_phase(run, "final policy", try_all=True)
    return finish_run(run, phase)
