"""ConsistentEE's training, top to bottom: warm-up, then policy and classifiers in turn until nothing is gained.

    phase 1  warm-up      backbone + classifiers on the layer-weighted sum of their losses
    phase 2  policy       fitted on cached states; judged on rows nobody has trained on
    phase 3  consistent   backbone + classifiers on the expected loss at the exit layer
    phases 2 and 3 repeat; of the rounds that validation finds no worse the last is kept, then the threshold is chosen

Source: ConsistentEE (AAAI 2024, arXiv:2312.11882). Differences: the exact policy gradient by default, a policy on
held-out rows (cross-fitted), some weighted sum kept in phase 3, one learning-rate schedule over all phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistentee.config import ClassificationTrainingConfig
from consistentee.data.rows import TextDataset
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import BUDGETS
from consistentee.functional.exits import choose_exit_layer, exit_distribution
from consistentee.functional.hardness import memorized_layer
from consistentee.functional.losses import consistent_loss, distillation_loss, layer_losses, weighted_sum_loss
from consistentee.functional.metrics import check_threshold_metric
from consistentee.functional.recall import recall_by_class, recall_warnings
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.progress import show_progress
from consistentee.training import checkpoints
from consistentee.training.policy import PolicyChoice, choose_policy
from consistentee.training.run import Report, Run, start_run
from consistentee.training.states import LayerStates
from consistentee.training.steps import Figures

AUTO_INPUTS = ("log_odds", "state+log_odds")
FORGETTING_CHECKS = 8  # looks at the policy's rows during warm-up, for the forgetting-events measure


def train(
    *,
    backbone: str | Path,
    train_data: TextDataset,
    output_dir: str | Path,
    config: ClassificationTrainingConfig | None = None,
    task: str | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Train an early-exit classifier and save it.

    Args:
        backbone: hub name or local folder of a supported encoder.
        train_data: labelled rows. A stratified `validation_fraction` of them is kept from the classifiers.
        output_dir: where checkpoints go during the run and the finished model afterwards.
        config: settings; the defaults if missing.
        task: name of the task, for the record.
        resume: go on from the last checkpoint in `output_dir` if there is one.
        report: is given lines of text to show.

    Returns:
        The folder of the saved model: weights, tokenizer, label names, threshold, training record, model card.

    Raises:
        FileExistsError: if `output_dir` holds another run and `resume` is not set, or anything of anybody else's.
        ValueError: if a resumed run has other settings, data or backbone, `output_dir` is the backbone's, or
            `threshold_metric` does not fit the classes.
    """
    config = config or ClassificationTrainingConfig()
    check_threshold_metric(config.threshold_metric, len(train_data.label_names))
    run = start_run(
        EarlyExitForSequenceClassification,
        backbone=backbone,
        train_data=train_data,
        output_dir=output_dir,
        config=config,
        task=task,
        resume=resume,
        report=report,
    )
    if run is None:
        return Path(output_dir)
    model, progress = run.model, run.progress
    warmup_steps = run.steps_of(config.warmup_epochs)
    round_steps = run.steps_of(config.consistent_epochs)

    # Phase 1: every classifier learns every instance, deeper layers weigh more.
    _warm_up(run, until=warmup_steps)
    if "warmup" not in progress:
        progress["warmup"] = _report_classifiers(run)
        run.checkpoint()

    # Phases 2 and 3, in turn.
    while not progress["training_done"]:
        number = progress["rounds_done"]
        if not progress["policy_fitted"]:
            # Phase 2: with everything else frozen, the policy learns when to leave.
            choice, states = _fit_policies(run, f"round {number} policy")
            _record_round(run, number, choice, states)
            progress["policy_fitted"] = True
            stale = number - progress["best_round"] >= config.patience
            progress["training_done"] = stale or number == config.rounds or round_steps == 0
            if stale and number < config.rounds:
                run.say(f"Stopped early: {config.patience} rounds in turn with a worse validation score.")
            run.checkpoint()
        if not progress["training_done"]:
            # Phase 3: an instance's loss comes from where it leaves.
            run.optimisation.run(
                warmup_steps + (number + 1) * round_steps,
                partial(_consistent_losses, weighted_sum_share=config.weighted_sum_share),
                phase=f"round {number + 1} consistent",
                learning_rate=config.consistent_learning_rate or config.learning_rate,
                before_step=model.policy.eval,
            )
            progress.update(rounds_done=number + 1, policy_fitted=False)
            run.checkpoint()

    # On the kept round's weights, the policy and the threshold.
    run.load_weights(checkpoints.load_weights(run.best_path))
    choice, states = _fit_policies(run, "final policy", all_prices=True)
    _report_choice(run, choice)
    record = _training_record(run, choice, states, train_data.label_names)
    return run.save(record, thresholds=choice.thresholds)


def finetune(
    *,
    backbone: str | Path,
    train_data: TextDataset,
    output_dir: str | Path,
    config: ClassificationTrainingConfig | None = None,
    task: str | None = None,
    resume: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Fine-tune the plain model, one classifier at the top, by the same recipe: the reference for every claim.

    Same rows, head, batches, learning rates and schedule as `train`, and as many epochs as all its phases together;
    the best epoch by validation accuracy is kept. Arguments and errors as in `train`.
    """
    run = start_run(
        FullDepthForSequenceClassification,
        backbone=backbone,
        train_data=train_data,
        output_dir=output_dir,
        config=config or ClassificationTrainingConfig(),
        task=task,
        resume=resume,
        report=report,
    )
    if run is None:
        return Path(output_dir)
    progress = run.progress
    per_epoch = run.steps_of(1.0)
    ends = [*range(per_epoch, run.optimisation.total_steps, per_epoch), run.optimisation.total_steps]
    for number, end in list(enumerate(ends))[progress["rounds_done"] :]:
        run.optimisation.run(
            end,
            _top_losses,
            phase=f"epoch {number + 1}",
            learning_rate=run.config.learning_rate,
        )
        logits = run.logits(run.validation, "validation")
        accuracy = float((logits.argmax(-1) == run.validation.labels).float().mean())
        run.say(f"Epoch {number + 1} of {len(ends)}: validation accuracy {accuracy:.4f}")
        progress["history"].append({"epoch": number + 1, "accuracy": accuracy})
        if (
            progress["best_score"] is None or accuracy >= progress["best_score"]
        ):  # of equals, the longer trained
            progress.update(best_score=accuracy, best_round=number)
            run.keep_best()
        progress["rounds_done"] = number + 1
        run.checkpoint()
    run.load_weights(checkpoints.load_weights(run.best_path))
    figures = {"accuracy": progress["best_score"], "num_examples": len(run.validation)}
    return run.save({"validation": figures, "history": progress["history"]})


# The losses of the phases: (output, labels) -> loss of every row, and figures of every row for the progress bar. The
# output is an `EarlyExitOutput` of all layers, or in `_top_losses` a `SequenceClassifierOutput`.


def _weighted_sum_losses(output: Any, labels: Tensor, *, distillation: float) -> tuple[Tensor, Figures]:
    losses = weighted_sum_loss(layer_losses(output.classifier_logits, labels))
    if distillation:
        losses = losses + distillation * distillation_loss(output.classifier_logits)
    return losses, {"accuracy": (output.classifier_logits[:, -1].argmax(-1) == labels).float()}


def _consistent_losses(output: Any, labels: Tensor, *, weighted_sum_share: float) -> tuple[Tensor, Figures]:
    at_exit = consistent_loss(layer_losses(output.layer_logits, labels), output.exit_probs)
    everywhere = weighted_sum_loss(layer_losses(output.classifier_logits, labels))
    probability = exit_distribution(output.exit_probs)  # (rows, layers)
    layers = torch.arange(1, probability.shape[1] + 1, device=probability.device, dtype=probability.dtype)
    right = (output.layer_logits.argmax(-1) == labels[:, None]).float()
    figures = {
        "exit_layer": probability @ layers,
        "accuracy": (probability * right).sum(1),
        "reward": -at_exit.detach(),
    }
    return weighted_sum_share * everywhere + (1 - weighted_sum_share) * at_exit, figures


def _top_losses(output: Any, labels: Tensor) -> tuple[Tensor, Figures]:
    losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
    return losses, {"accuracy": (output.logits.argmax(-1) == labels).float()}


# The steps of the phases.


def _warm_up(run: Run, until: int) -> None:
    """Phase 1. For the forgetting-events measure it stops now and then to see which of the policy's rows are right."""
    counting = run.config.hardness == "forgetting_events"
    stops = (
        [round(until * part / FORGETTING_CHECKS) for part in range(1, FORGETTING_CHECKS + 1)]
        if counting
        else [until]
    )
    for stop in stops:
        if run.optimisation.step >= stop:
            continue
        run.optimisation.run(
            stop,
            partial(_weighted_sum_losses, distillation=run.config.distillation),
            phase="warm-up",
            learning_rate=run.config.learning_rate,
            before_step=run.model.policy.eval,
        )
        if counting:
            states = run.states(run.policy_rows, "forgetting events")
            right = (states.layer_logits[:, -1].argmax(-1) == states.labels).int().tolist()
            run.progress["forgetting"].append(right)
        run.checkpoint()


def _fit_policies(
    run: Run, description: str, *, all_prices: bool = False
) -> tuple[PolicyChoice, LayerStates]:
    """Phase 2: cache the states, fit policies, and put the chosen one into the model on every process.

    All prices and policy inputs are tried the first time and on the final weights; the rounds between keep those they
    began with.
    """
    config, progress = run.config, run.progress
    prices, inputs = config.layer_costs, (config.policy_input,)
    if config.policy_input == "auto":
        inputs = AUTO_INPUTS
    if progress["layer_cost"] is not None and not all_prices:
        inputs = (progress["policy_input"],)
        if config.prices == "each":
            prices = (progress["layer_cost"],)
    cross_fitted = config.policy_data == "held_out"
    states = run.states(run.policy_rows, f"{description}: states", keep_pooled=True)
    validation = (
        None if cross_fitted else run.states(run.validation, f"{description}: validation", keep_pooled=True)
    )
    choice: PolicyChoice | None = None
    if run.accelerator.is_main_process:
        num_prices = 1 if config.prices == "range" else len(prices)
        fits = len(inputs) * (num_prices * config.policy_folds + 1 if cross_fitted else num_prices)
        with show_progress(f"{description}: fits", fits, unit="fit") as bar:
            choices = [
                choose_policy(
                    partial(run.model.new_policy, policy_input),
                    states,
                    validation,
                    config=config,
                    layer_costs=prices,
                    seed=config.seed,
                    forgetting_counts=_forgetting_counts(progress["forgetting"]),
                    device=run.accelerator.device,
                    on_fit=bar.update,
                )
                for policy_input in inputs
            ]
        choice = max(choices, key=lambda choice: (not choice.report.collapsed, choice.report.score))
    choice = run.from_main_process(choice)
    run.model.set_policy(choice.policy.requires_grad_(False))
    progress.update(layer_cost=choice.layer_cost, policy_input=choice.policy.policy_input)
    return choice, states if validation is None else validation


def _forgetting_counts(checks: list[list[int]]) -> Tensor | None:
    """How often each row went from right to wrong between checks; a row that was never right counts as every time."""
    if not checks:
        return None
    right = torch.tensor(checks)  # (checks, rows)
    forgotten = ((right[:-1] == 1) & (right[1:] == 0)).sum(0)
    return torch.where(right.sum(0) == 0, torch.full_like(forgotten, len(checks)), forgotten)


def _record_round(run: Run, number: int, choice: PolicyChoice, states: LayerStates) -> None:
    """Note how the round did on validation rows, say it, and keep its weights if none did better.

    A round that is within one standard error of the best score counts as no worse and is kept in its place: it has
    had more training, at falling learning rates.
    """
    report, progress = choice.report, run.progress
    figures = asdict(report) | {
        "round": number,
        "step": run.optimisation.step,
        "per_layer_accuracy": _accuracies(states.layer_logits, states.labels),
        "scores": choice.scores,
    }
    progress["history"].append(figures)
    run.say(
        f"Round {number}: validation score {report.score:.4f}, at threshold 0.5 accuracy {report.accuracy:.4f} and "
        f"mean exit layer {report.mean_exit_layer:.2f}, reward {report.reward:.4f} (layer cost {report.layer_cost:g})"
    )
    _report_collapses(run, choice)
    hits = choice.hits.tolist()
    if progress["best_score"] is None or report.score > progress["best_score"]:
        progress.update(best_score=report.score, best_hits=hits, best_round=number)
        run.keep_best()
    elif report.score >= progress["best_score"] - _standard_error(hits, progress["best_hits"]):
        progress.update(best_round=number)
        run.keep_best()


def _standard_error(hits: list[int], best_hits: list[int]) -> float:
    """Of the difference between two scores on the same rows, from each row's hits at the `BUDGETS`."""
    differences = torch.tensor(hits, dtype=torch.float64) - torch.tensor(best_hits, dtype=torch.float64)
    return float(differences.std() / len(BUDGETS) / len(hits) ** 0.5)


def _report_classifiers(run: Run) -> dict[str, Any]:
    """Say every classifier's validation accuracy beside the majority share, and name the dead ones."""
    states = run.states(run.validation, "validation")
    accuracies = _accuracies(states.classifier_logits, states.labels)
    majority = float(torch.bincount(states.labels).max() / len(states))
    run.say("Accuracy by layer after warm-up: " + " ".join(f"{value:.3f}" for value in accuracies))
    run.say(f"Majority share: {majority:.3f}")
    dead = [layer for layer, value in enumerate(accuracies, start=1) if value <= majority + 0.005]
    if dead:
        run.say(
            f"No better than the majority class: layer {', '.join(map(str, dead))}. Inputs that leave there are "
            "guesses. Try a higher head_learning_rate, head: attention, or more warmup_epochs."
        )
    layers = memorized_layer(states.classifier_logits.argmax(-1) == states.labels[:, None])
    return {
        "per_layer_accuracy": accuracies,
        "majority_share": majority,
        "dead_layers": dead,
        "memorized_layer_histogram": torch.bincount(layers - 1, minlength=run.model.num_layers).tolist(),
    }


def _report_collapses(run: Run, choice: PolicyChoice) -> None:
    for report in choice.reports:
        if report.collapsed:
            run.say(
                f"Layer cost {report.layer_cost:g} collapsed: {report.first_layer_share:.0%} leave at layer 1 with "
                f"accuracy {report.accuracy:.3f}. "
                + ("Try lower layer_costs." if choice.report.collapsed else "It is not used.")
            )


def _report_choice(run: Run, choice: PolicyChoice) -> None:
    _report_collapses(run, choice)
    run.say(
        f"Chosen on validation: weights of round {run.progress['best_round']}, policy on "
        f"{choice.policy.policy_input.replace('+', ' and ').replace('_', '-')}, layer cost {choice.layer_cost:g}, "
        f"threshold {choice.thresholds['policy']:.4f}"
    )


def _training_record(
    run: Run, choice: PolicyChoice, states: LayerStates, label_names: Sequence[str]
) -> dict[str, Any]:
    scores = exit_scores("policy", states.layer_logits, choice.exit_probs)
    exit_layer = choose_exit_layer(scores, choice.thresholds["policy"])
    right = (states.layer_logits.argmax(-1) == states.labels[:, None]).float()
    mean = float(exit_layer.float().mean())
    predictions = states.layer_logits.argmax(-1)
    at_exit = predictions.gather(1, exit_layer[:, None] - 1).squeeze(1)
    classes = recall_by_class(at_exit, predictions[:, -1], states.labels, label_names)
    metric = run.config.threshold_metric
    for line in recall_warnings(classes, choice.thresholds["policy"], threshold_metric=metric):
        run.say(f"Warning, on validation rows: {line}")
    return {
        "warmup": run.progress["warmup"],
        "history": run.progress["history"],
        "best_round": run.progress["best_round"],
        "policy": choice.to_dict(),
        "validation": {
            "num_examples": len(states),
            "accuracy": float(right.gather(1, exit_layer[:, None] - 1).mean()),
            "full_depth_accuracy": float(right[:, -1].mean()),
            "mean_exit_layer": mean,
            "layer_speedup": run.model.num_layers / mean,
            "per_layer_accuracy": _accuracies(states.layer_logits, states.labels),
            "class_recall": [asdict(found) for found in classes],
        },
    }


def _accuracies(layer_logits: Tensor, labels: Tensor) -> list[float]:
    """Every layer's accuracy: (rows, layers, classes), (rows,) -> layers floats."""
    return (layer_logits.argmax(-1) == labels[:, None]).float().mean(0).tolist()
