"""Phase 2 inside a run: its fits, what is said and kept of a round, and the record at the end."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import ne
from typing import Any

import torch
from torch import Tensor

from consistentee.config import TrainingConfig
from consistentee.functional.bounds import paired_interval
from consistentee.functional.criteria import digits
from consistentee.functional.curves import (
    TOLERANCES,
    changed_by_exits,
    score_standard_error,
    trade_off_curve,
)
from consistentee.functional.exits import choose_exit_layer
from consistentee.progress import show_progress
from consistentee.training.criterion_fits import fit_criteria
from consistentee.training.instances import group_folds
from consistentee.training.policy import fit_foretelling, fit_policy
from consistentee.training.policy_choice import (
    PolicyChoice,
    PolicySearch,
    choose_policy,
)
from consistentee.training.run import PolicyInstances, Run


@dataclass(frozen=True)
class PolicyPhase:
    """What phase 2 came to.

    Attributes:
        choice: the policy and all thresholds.
        data: what it learnt from and was judged by.
        complete: whether all policy inputs and layer costs were tried.
    """

    choice: PolicyChoice
    data: PolicyInstances
    complete: bool

    @property
    def per_layer_accuracy(self) -> list[float]:
        """Share of the judged instances that each exit gets right."""
        return self.data.judged_instances.correct.double().mean(0).tolist()


def policy_search(
    config: TrainingConfig,
    criteria: tuple[str, ...],
    *,
    layer_costs: tuple[float, ...],
    min_exit_layer: int = 1,
    device: torch.device | str = "cpu",
) -> PolicySearch:
    """What a training tries in phase 2, from its settings."""
    steps: dict[str, Any] = {
        "epochs": config.policy_epochs,
        "min_steps": config.policy_min_steps,
        "batch_size": config.policy_batch_size,
        "learning_rate": config.policy_learning_rate,
        "weight_decay": config.policy_weight_decay,
    }
    return PolicySearch(
        fit=partial(
            fit_policy,
            estimator=config.estimator,
            num_rollouts=config.num_rollouts,
            entropy_bonus=config.entropy_bonus,
            layer_cost_warmup=config.layer_cost_warmup,
            max_grad_norm=config.max_grad_norm,
            **steps,
        ),
        fit_network=partial(fit_foretelling, **steps),
        layer_costs=layer_costs,
        as_range=config.layer_cost_mode == "range",
        folds=config.policy_folds,
        seed=config.seed,
        criteria=criteria,
        max_loss=config.max_accuracy_loss,
        margin=config.threshold_margin,
        min_exit_layer=min_exit_layer,
        device=device,
    )


def run_policy_phase(
    run: Run, description: str, *, try_all: bool = False, keep_policy: bool = False
) -> PolicyPhase:
    """Run all layers for the policy's instances, fit policies, and put the chosen one into the model everywhere.

    All layer costs and policy inputs are tried the first time and with `try_all`; the rounds between keep those that
    they began with. With `keep_policy` none is fitted: the model's own, which steps have trained, is judged.
    """
    config, task, progress = run.config, run.task, run.progress
    costs, inputs = config.layer_costs, task.policy_inputs
    if progress["layer_cost"] is not None and not try_all:
        inputs = (progress["policy_input"],)
        if config.layer_cost_mode == "each":
            costs = (progress["layer_cost"],)
    search = policy_search(
        config,
        task.criteria,
        layer_costs=costs,
        min_exit_layer=getattr(run.model.config, "min_exit_layer", 1),
        device=run.accelerator.device,
    )
    if keep_policy:
        inputs, costs = (run.model.policy.policy_input,), costs[:1]
        # A copy where the instances are, as a fit would give: the model's own may be on a GPU.
        search = replace(
            search, fit=lambda policy, *_, **__: deepcopy(policy).cpu().eval(), layer_costs=costs
        )
    data = task.policy_data(run, description)
    if data.max_loss is not None:
        search = replace(search, max_loss=data.max_loss)
    how = task.criterion_fits(run.model, search)
    choice: PolicyChoice | None = None
    if run.accelerator.is_main_process:
        fitted = data.learnt if data.fill_up else data.judged_instances
        folds = group_folds(fitted.group, search.folds, search.seed, len(data.judged_instances))
        count = search.number_of_fits(cross_fitted=data.judged is None) * len(inputs)
        count += len(how) * (len(folds) + 1)
        with show_progress(f"{description}: fits", count, unit="fit") as bar:
            fits = fit_criteria(how, fitted, folds, bar.update)
            choices = [
                choose_policy(
                    data.learnt,
                    search,
                    new_policy=(lambda: run.model.policy)
                    if keep_policy
                    else partial(task.new_policy, run.model, policy_input),
                    fits=fits,
                    judged=data.judged,
                    judged_groups=data.judged_groups,
                    quality=data.quality,
                    effects=data.effects,
                    on_fit=bar.update,
                )
                for policy_input in inputs
            ]
        choice = max(choices, key=lambda choice: (not choice.report.collapsed, choice.report.score))
    choice = run.from_main_process(choice)
    install_choice(run, choice)
    _say_collapses(run, choice)
    return PolicyPhase(choice, data, inputs == task.policy_inputs and costs == config.layer_costs)


def install_choice(run: Run, choice: PolicyChoice) -> None:
    """Put what phase 2 chose into the model."""
    run.task.install(run.model, choice)
    run.progress.update(layer_cost=choice.layer_cost, policy_input=choice.policy.policy_input)


def is_no_worse(choice: PolicyChoice, score: float, hits: Sequence[int]) -> bool:
    """Whether a choice is within one standard error of a validation score, or above it.

    Args:
        choice: of phase 2.
        score, hits: of another one on the same instances, its report's and `PolicyChoice.hits`.
    """
    return choice.report.score >= score - score_standard_error(choice.hits, torch.tensor(hits), choice.counts)


def record_round(run: Run, number: int, phase: PolicyPhase) -> None:
    """Note how the round did on validation instances, say it, and keep its weights if none did better.

    A round that is within one standard error of the best score counts as no worse and is kept in its place: it has
    had more training, at falling learning rates.
    """
    choice, progress, measure = phase.choice, run.progress, run.task.measure
    report, accuracies = choice.report, phase.per_layer_accuracy
    if number == 0:
        progress["warmup"] = _first_figures(run, phase)
    exits = choose_exit_layer(choice.exit_probs, choice.thresholds["policy"]).tolist()
    before = (
        progress.get("exit_layers") or []
    )  # none in the first round, or in a run that an earlier version began
    same_instances = len(before) == len(exits)
    changed = sum(map(ne, exits, before)) / len(exits) if same_instances else None
    progress["exit_layers"] = exits
    progress["history"].append(
        asdict(report)
        | {
            "round": number,
            "step": run.steps.step,
            "changed_exits": changed,
            "per_layer_accuracy": accuracies,
            "scores": choice.scores,
            "thresholds": choice.thresholds,
        }
    )
    run.say(
        f"Round {number}: validation score {report.score:.4f}, last layer's {measure} {accuracies[-1]:.4f}, at "
        f"threshold 0.5 {report.accuracy:.4f} with mean exit layer {report.mean_exit_layer:.2f}, reward "
        f"{report.reward:.4f} (layer cost {report.layer_cost:g})"
    )
    hits = choice.hits.tolist()
    if progress["best_score"] is None or report.score > progress["best_score"]:
        progress.update(best_score=report.score, best_hits=hits, best_round=number)
        run.keep_best()
    elif is_no_worse(choice, progress["best_score"], progress["best_hits"]):
        progress.update(best_round=number)
        run.keep_best()


def _first_figures(run: Run, phase: PolicyPhase) -> dict[str, Any]:
    """Say every exit's accuracy beside what guessing gives, and name the exits that are no better."""
    figures = run.task.first_figures(run, phase.data)
    measure = run.task.measure
    guess_name = next(name for name in figures if name.endswith("_share"))
    guess, accuracies = figures[guess_name], figures["per_layer_accuracy"]
    layers = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    run.say(f"{measure.capitalize()} by layer after warm-up: {layers}")
    run.say(f"{guess_name.replace('_', ' ').capitalize()}: {guess:.3f}")
    dead = [layer for layer, accuracy in enumerate(accuracies, start=1) if accuracy <= guess + 0.005]
    if dead:
        run.say(
            f"No better than a guess: layer {', '.join(map(str, dead))}. What exits there is not to be relied on. Try "
            "a higher head_learning_rate, a richer head, or more warmup_epochs."
        )
    return {**figures, "dead_layers": dead}


def _say_collapses(run: Run, choice: PolicyChoice) -> None:
    for report in choice.reports:
        if report.collapsed:
            run.say(
                f"Layer cost {report.layer_cost:g} collapsed: {report.first_layer_share:.0%} exit at the first layer "
                f"with {run.task.measure} {report.accuracy:.3f}. "
                + ("Try lower layer_costs." if choice.report.collapsed else "It is not used.")
            )


def finish_run(run: Run, phase: PolicyPhase, criterion: str = "policy") -> Any:
    """Say what was chosen and save the model with its record.

    Args:
        run: the run.
        phase: its last phase 2.
        criterion: the one that the saved model exits by unless it is told otherwise.

    Returns:
        The folder.
    """
    choice, config = phase.choice, run.config
    reads = choice.policy.policy_input.replace("+", " and ").replace("_", "-")
    max_loss = config.max_accuracy_loss if phase.data.max_loss is None else phase.data.max_loss
    metric = _other_metric(config)
    of_metric = f" of {metric}" if metric else ""
    run.say(
        f"Chosen on validation: weights of round {run.progress['best_round']}, policy on "
        f"{reads}, layer cost {choice.layer_cost:g}, at most "
        f"{100 * max_loss:.4g} points{of_metric} below the last layer:"
    )
    for name, at in choice.at_thresholds.items():
        run.say(
            f"  {name}: threshold {digits(at.threshold)}, {run.task.measure} {at.accuracy:.4f}, mean exit layer "
            f"{at.mean_exit_layer:.2f}"
        )
    bought = ", ".join(
        f"{100 * allowed:g} points {at.layer_speedup:.2f}x"
        for allowed, at in zip(TOLERANCES, choice.at_tolerances[criterion], strict=True)
    )
    run.say(f"  {criterion}, fewer layers by the loss{of_metric} that is allowed: {bought}")
    loss = _loss_at_exits(run, phase, criterion)
    model = run.task.finish(run, choice, criterion)
    point, accuracies = choice.at_thresholds[criterion], phase.per_layer_accuracy
    extra = run.task.record(run, phase.data, choice, criterion)
    validation = {
        "num_examples": len(phase.data.judged_instances),
        "accuracy": point.accuracy,
        "full_depth_accuracy": accuracies[-1],
        "mean_exit_layer": point.mean_exit_layer,
        "layer_speedup": point.layer_speedup,
        "per_layer_accuracy": accuracies,
        "criteria": {name: asdict(at) for name, at in choice.at_thresholds.items()},
        "tolerances": {
            name: [{"max_loss": allowed} | asdict(at) for allowed, at in zip(TOLERANCES, points, strict=True)]
            for name, points in choice.at_tolerances.items()
        },
        "curve": _curve(choice.exit_scores[criterion], phase.data.judged_instances.correct, criterion),
        **({} if loss is None else {"loss": loss}),
        **extra.pop("validation", {}),
    }
    record = {
        "warmup": run.progress["warmup"],
        "history": run.progress["history"],
        "best_round": run.progress["best_round"],
        "policy": choice.to_dict(),
        "thresholds": choice.thresholds,
        "validation": validation,
        **extra,
    }
    if taken_over := run.progress.get("taken_over"):
        record["shared_warm_up"] = taken_over
    return run.save(model, record)


def _other_metric(config: TrainingConfig) -> str | None:
    """By what thresholds were chosen where it is not the accuracy, which all that is said is about."""
    metric = getattr(config, "threshold_metric", "accuracy")
    return None if metric == "accuracy" else metric


def _curve(scores: Tensor, correct: Tensor, criterion: str) -> list[list[float]]:
    """Threshold, accuracy, mean exit layer and `changed_by_exits` along the curve of the judged instances."""
    return [
        [
            point.threshold,
            point.accuracy,
            point.mean_exit_layer,
            changed_by_exits(choose_exit_layer(scores, point.threshold), correct),
        ]
        for point in trade_off_curve(scores, correct, criterion)
    ]


def finish_exits(run: Run, criterion: str, *, keep_policy: bool = False) -> Any:
    """After the last step of a method that trains exits and no policy: choose thresholds of all criteria, and save.

    A policy is fitted on the finished exits all the same, unless `keep_policy` says that the model has one.

    Args:
        run: the run.
        criterion: the one that the saved model exits by unless it is told otherwise.
        keep_policy: as in `run_policy_phase`.

    Returns:
        The folder.
    """
    run.checkpoint()
    phase = run_policy_phase(run, "thresholds", try_all=True, keep_policy=keep_policy)
    record_round(run, 0, phase)
    return finish_run(run, phase, criterion)


def _loss_at_exits(run: Run, phase: PolicyPhase, criterion: str) -> dict[str, Any] | None:
    """Say and return what exiting at the chosen threshold loses against the last layer, with its interval.

    None for tokens: those of a text are not independent, which the interval takes them to be.
    """
    judged, choice = phase.data.judged_instances, phase.choice
    if not torch.equal(judged.group, torch.arange(len(judged))):
        return None
    exit_layer = choose_exit_layer(choice.exit_scores[criterion], choice.thresholds[criterion])
    at_exit = judged.correct.gather(1, exit_layer[:, None] - 1).squeeze(1)
    lost, won = (
        int(rows.sum()) for rows in (judged.correct[:, -1] & ~at_exit, at_exit & ~judged.correct[:, -1])
    )
    agrees_with_itself = run.task.measure == "agreement" and bool(judged.correct[:, -1].all())
    low, high = paired_interval(lost, won, len(judged), can_win=not agrees_with_itself)
    loss = (lost - won) / len(judged)
    of_measure = f" of {run.task.measure}" if _other_metric(run.config) else ""
    run.say(
        f"On {len(judged):,} validation rows the loss of {criterion} against the last layer is {100 * loss:.2f} points"
        f"{of_measure} (95 % interval {100 * low:.2f} to {100 * high:.2f}). They chose the threshold as well; "
        "`consistentee calibrate` certifies one on rows of their own."
    )
    return {
        "criterion": criterion,
        "loss": loss,
        "interval": [low, high],
        "confidence": 0.95,
        "lost": lost,
        "won": won,
    }
