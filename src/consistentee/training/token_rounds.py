"""What a training with exits says and keeps of its rounds: exits, policies, the best round, the record."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from consistentee.functional.curves import BUDGETS
from consistentee.functional.hardness import memorized_layer
from consistentee.training.run import Run
from consistentee.training.token_policy import TokenPolicyChoice
from consistentee.training.token_states import TokenStates


def report_exits(run: Run, states: TokenStates) -> dict[str, Any]:
    """Say every exit's token accuracy beside the share of the commonest token, and name the dead ones."""
    accuracies = states.per_layer_accuracy
    commonest = float(torch.bincount(states.labels).max() / len(states))
    run.say(
        "Token accuracy by layer after warm-up: " + " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    )
    run.say(f"Share of the commonest token: {commonest:.3f}")
    dead = [layer for layer, accuracy in enumerate(accuracies, start=1) if accuracy <= commonest + 0.005]
    if dead:
        run.say(
            f"No better than the commonest token: layer {', '.join(map(str, dead))}. Tokens that leave there are "
            "guesses. Try a higher head_learning_rate, exit_head: low_rank, or more warmup_epochs."
        )
    layers = memorized_layer(states.right)
    return {
        "per_layer_accuracy": accuracies,
        "per_layer_loss": states.losses.mean(0).tolist(),
        "commonest_token_share": commonest,
        "dead_layers": dead,
        "memorized_layer_histogram": torch.bincount(layers - 1, minlength=run.model.num_layers).tolist(),
    }


def record_round(run: Run, number: int, choice: TokenPolicyChoice, states: TokenStates) -> None:
    """Note how the round did on validation tokens, say it, and keep its weights if none did better.

    A round that is within one standard error of the best score counts as no worse and is kept in its place: it has
    had more training, at falling learning rates.
    """
    report, progress = choice.report, run.progress
    progress["history"].append(
        asdict(report)
        | {
            "round": number,
            "step": run.optimisation.step,
            "per_layer_accuracy": states.per_layer_accuracy,
            "scores": choice.scores,
            "thresholds": choice.thresholds,
        }
    )
    run.say(
        f"Round {number}: validation score {report.score:.4f}, last layer's token accuracy "
        f"{states.per_layer_accuracy[-1]:.4f}, at threshold 0.5 {report.accuracy:.4f} with mean exit layer "
        f"{report.mean_exit_layer:.2f}, reward {report.reward:.4f} (layer cost {report.layer_cost:g})"
    )
    for other in choice.reports:
        if other.collapsed:
            run.say(
                f"Layer cost {other.layer_cost:g} collapsed: {other.first_layer_share:.0%} leave at layer 1 with "
                f"token accuracy {other.accuracy:.3f}. Try lower layer_costs."
            )
    hits = choice.hits.tolist()
    if progress["best_score"] is None or report.score > progress["best_score"]:
        progress.update(best_score=report.score, best_hits=hits, best_round=number)
        run.keep_best()
    elif report.score >= progress["best_score"] - score_standard_error(
        choice.hits, torch.tensor(progress["best_hits"]), choice.counts
    ):
        progress.update(best_round=number)
        run.keep_best()


def score_standard_error(hits: Tensor, best_hits: Tensor, counts: Tensor) -> float:
    """Of the difference between two scores on the same tokens, which are not independent within a text.

    Args:
        hits, best_hits: (texts,), hits at the `BUDGETS` summed over each text's tokens.
        counts: (texts,), tokens of each text.

    Example:
        >>> round(score_standard_error(torch.tensor([6, 0]), torch.tensor([0, 6]), torch.tensor([1, 1])), 3)
        0.707
    """
    differences = (hits - best_hits).double() / len(BUDGETS)
    counts = counts.double()
    mean = differences.sum() / counts.sum()
    return float((differences - mean * counts).square().sum().sqrt() / counts.sum())


def report_choice(run: Run, choice: TokenPolicyChoice) -> None:
    """Say what was chosen, and what every criterion gives at its threshold."""
    run.say(
        f"Chosen on validation: weights of round {run.progress['best_round']}, layer cost {choice.layer_cost:g}, "
        f"at most {100 * run.config.max_accuracy_loss:g} points of token accuracy below the last layer:"
    )
    for criterion, point in choice.at_thresholds.items():
        run.say(
            f"  {criterion}: threshold {point.threshold:.4f}, token accuracy {point.accuracy:.4f}, "
            f"mean exit layer {point.mean_exit_layer:.2f}"
        )


def training_record(run: Run, choice: TokenPolicyChoice, states: TokenStates) -> dict[str, Any]:
    """What is saved beside the weights: history, thresholds, and the figures on validation tokens."""
    point = choice.at_thresholds["policy"]
    return {
        "warmup": run.progress["warmup"],
        "history": run.progress["history"],
        "best_round": run.progress["best_round"],
        "policy": choice.to_dict(),
        "thresholds": choice.thresholds,
        "prompt_template": run.model.config.prompt_template,
        "validation": {
            "num_examples": len(states),
            "accuracy": point.accuracy,
            "full_depth_accuracy": states.per_layer_accuracy[-1],
            "mean_exit_layer": point.mean_exit_layer,
            "layer_speedup": point.layer_speedup,
            "per_layer_accuracy": states.per_layer_accuracy,
            "per_layer_loss": states.losses.mean(0).tolist(),
            "criteria": {name: asdict(point) for name, point in choice.at_thresholds.items()},
        },
    }
