"""Phase 2 inside a run: which tokens the policy learns from, its fit, and the first layer that tokens may leave at."""

from __future__ import annotations

from typing import cast

from consistentee.data.batches import TokenizedPrompts, with_more_tokens
from consistentee.errors import SettingError
from consistentee.heads.exit_heads import ConfidenceClassifier
from consistentee.progress import show_progress
from consistentee.training import checkpoints
from consistentee.training.run import Run
from consistentee.training.token_policy import TokenPolicyChoice, choose_token_policy, number_of_fits
from consistentee.training.token_states import TokenStates, run_token_states


def first_exit_layer(wanted: int | None, num_layers: int) -> int:
    """The first layer that tokens may leave at: the one that is wanted, or a sixth of all, rounded up.

    Raises:
        ValueError: the model is not that deep.

    Example:
        >>> first_exit_layer(None, 30), first_exit_layer(None, 4), first_exit_layer(3, 4)
        (5, 1, 3)
    """
    if wanted is None:
        return -(-num_layers // 6)
    if wanted > num_layers:
        raise SettingError(
            f"min_exit_layer must be at most {num_layers}, the number of layers, got {wanted}. Give a smaller one."
        )
    return wanted


def token_states(
    run: Run, dataset: TokenizedPrompts, description: str, *, keep_pooled: bool, last_layer_only: bool = False
) -> TokenStates:
    """Exits' outputs for response tokens of rows, the same tokens every time.

    Args:
        run: the run; its settings say how many tokens.
        dataset: the rows.
        description: label of the progress bar.
        keep_pooled, last_layer_only: as in `run_token_states`.
    """
    config = run.config
    return run_token_states(
        run.model,
        dataset,
        collate=run.optimisation.collate,
        max_tokens=config.policy_tokens,
        seed=config.seed,
        target=config.reward_target,
        logit_rows=config.logit_rows,
        accelerator=run.accelerator,
        keep_pooled=keep_pooled,
        last_layer_only=last_layer_only,
        memory_limit_mb=config.max_cache_mb,
        scratch_dir=run.output_dir / checkpoints.FOLDER,
        description=description,
    )


def run_policy_phase(run: Run, description: str) -> tuple[TokenPolicyChoice, TokenStates]:
    """Cache the states, fit policy and classifier, and put them into the model on every process.

    Returns:
        What was chosen, and the held-out tokens it was chosen on.
    """
    config, model = run.config, run.model
    rows = run.validation
    if config.policy_data == "filled":
        training_rows = cast(TokenizedPrompts, run.optimisation.dataset)
        rows = with_more_tokens(rows, training_rows, config.policy_tokens, config.seed)
    states = token_states(run, rows, f"{description}: states", keep_pooled=True)
    choice: TokenPolicyChoice | None = None
    if run.accelerator.is_main_process:
        total = number_of_fits(config, len(config.layer_costs))
        with show_progress(f"{description}: fits", total, unit="fit") as bar:
            choice = choose_token_policy(
                model.new_policy,
                lambda: ConfidenceClassifier(model.num_layers, model.config.hidden_size),
                states,
                config=config,
                layer_costs=config.layer_costs,
                seed=config.seed,
                min_exit_layer=model.config.min_exit_layer,
                judged_texts=len(run.validation),
                device=run.accelerator.device,
                on_fit=bar.update,
            )
    choice = run.from_main_process(choice)
    model.policy.load_state_dict(choice.policy.state_dict())
    model.confidence_classifier.load_state_dict(choice.classifier.state_dict())
    return choice, states.first_texts(len(run.validation))
