"""What the command `benchmark` does for text generators."""

from __future__ import annotations

from consistentee.backbones.limits import say_cuts
from consistentee.cli.benchmark import REPEATS, BenchmarkOptions, show_speed
from consistentee.cli.kinds import GENERATORS
from consistentee.cli.terminal import announced, usage
from consistentee.data.generation import read_prompts
from consistentee.data.tokenization import encode_prompts
from consistentee.errors import UsageError
from consistentee.evaluation.speed import exit_distribution_shares, random_token_ids
from consistentee.evaluation.speed_generation import measure_generation_speed, shape_generator
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.models.loaded import DTYPES, usable_device


def benchmark_generator(
    model: str | None, options: BenchmarkOptions, sizes: list[int], budget: TimeBudget
) -> None:
    """Measure a text generator, or a shape of one, and print what was found; arguments as for classifiers.

    Raises:
        UsageError: options contradict each other, or a value makes no sense.
    """
    dtype, place, distribution = options.dtype, options.place, options.exit_distribution
    new_tokens, num_rows = options.new_tokens or 128, options.num_rows or max(sizes)
    if dtype not in DTYPES:
        raise UsageError(f'--dtype must be one of {", ".join(DTYPES)} for text generators, got "{dtype}".')
    if model is None:
        if options.lossless:
            raise UsageError("--lossless goes with a trained model: random exits draft nothing that stays.")
        name = options.config_name or ""
        network = shape_generator(
            name,
            seed=options.seed,
            dtype=DTYPES[dtype],
            device=None if place is None else usable_device(place),
        )
        prompts = random_token_ids(
            num_rows, options.sequence_length or 32, network.config.vocab_size, options.seed
        )
        distribution = distribution or "even"
    else:
        name = model
        saved = GENERATORS.load(name, device=place, dtype=dtype)
        network = usage(lambda: saved.early_exit_model)
        room = max(1, saved.context_length - new_tokens)
        prompts, cut = encode_prompts(
            _prompts(options)[:num_rows], saved.tokenizer, saved.prompt_template(), max_prompt_length=room
        )
        texts = f"prompts were longer than the {room} tokens that {new_tokens} new ones leave room for"
        say_cuts(sum(cut), len(cut), texts, "Lower --new-tokens to keep more of them.")
    shares = None
    if distribution is not None:
        shares = usage(lambda: exit_distribution_shares(distribution, network.num_layers))
    usage(lambda: network.exit_rule(options.criterion, options.threshold))
    with announced() as (announce, tick):
        report = measure_generation_speed(
            network,
            prompts,
            name=name,
            batch_sizes=sizes,
            new_tokens=new_tokens,
            shares=shares,
            criterion=options.criterion,
            threshold=options.threshold,
            lossless=options.lossless,
            repeats=options.repeats or REPEATS,
            seed=options.seed,
            budget=budget,
            announce=announce,
            tick=tick,
        )
    show_speed(report, options, f"{report.workload['model']}, {dtype}")


def _prompts(options: BenchmarkOptions) -> list[tuple[str, str]]:
    """Instructions and inputs that a generator is measured on."""
    if options.data_file is not None:
        return [(row["prompt"], row["input"]) for row in read_prompts(str(options.data_file))]
    rows = GENERATORS.load_task(options.task or "", options.data_dir)[1]
    return list(zip(rows.instructions, rows.inputs, strict=True))
