"""One training run around its method: start or resume it, remember how far it came, save what it made.

What differs between rows and tokens is a `TrainingTask`, what differs between ways of training a method (`methods/`).
Both are handed a `Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from consistentee.atomic_files import room_in, write_json
from consistentee.config import TrainingConfig
from consistentee.heads.policy import PolicyNetwork
from consistentee.inference.timing import environment
from consistentee.models.card import write_model_card
from consistentee.models.record import RECORD_FILE
from consistentee.training import checkpoints
from consistentee.training.criterion_fits import CriterionFit
from consistentee.training.instances import Instances
from consistentee.training.policy_choice import PolicyChoice, PolicySearch
from consistentee.training.steps import Batches, Collate, Objective, OptimizerSteps

Report = Callable[[str], None]
T = TypeVar("T")


@dataclass
class Parts:
    """What a task makes of a backbone and data.

    Attributes:
        model: with exits, or the plain one.
        tokenizer: of the backbone.
        train_rows, validation: tokenized; the latter are kept from the model, for every choice.
        collate: makes a padded batch of items.
        max_length: tokens that texts were cut to.
        row_weights: (rows,), what a row's loss weighs in the mean over a batch; None where all weigh the same.
        description: of the model and its data, in words.
        data: further figures of the data, for the record.
        trained: what steps run and train; None for the model.
        batches: of the rows; None for shuffled ones of similar length.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    train_rows: Any
    validation: Any
    collate: Collate
    max_length: int
    row_weights: Tensor | None
    description: str
    data: dict[str, Any]
    trained: nn.Module | None = None
    batches: Batches | None = None


@dataclass(frozen=True)
class PolicyInstances:
    """What phase 2 learns from and is judged by.

    Attributes:
        learnt: instances the policy learns from.
        judged: others to judge it by; None cross-fits.
        judged_groups: in cross-fitting, so many of the first groups are judged; None judges all.
        states: the pass that the judged instances come from, for the task's own figures.
        quality: what exit layers of the judged instances are worth, (instances,) -> float; None: the share right.
        effects: what each instance that exits change moves it by, (instances,) -> (changed,); None: as of that share.
        fill_up: whether other criteria are fitted on all that the policy learns from, not on the judged instances
            alone, which are then the first of them.
        max_loss: what a threshold may lose of it against the last layer; None: what the settings say.
    """

    learnt: Instances
    judged: Instances | None
    judged_groups: int | None
    states: Any
    quality: Callable[[Tensor], float] | None = None
    effects: Callable[[Tensor], Tensor] | None = None
    fill_up: bool = False
    max_loss: float | None = None

    @property
    def judged_instances(self) -> Instances:
        """The instances that are judged."""
        if self.judged is not None:
            return self.judged
        return self.learnt if self.judged_groups is None else self.learnt.first_groups(self.judged_groups)


class TrainingTask(Protocol):
    """Rows of a classifier, or tokens of a language model: all that training does differently for them.

    Attributes:
        config: how to train.
        data: labelled texts, or instructions with responses.
        task: `CLASSIFICATION` or `GENERATION`.
        suffix: of the record's `kind`.
        measure: what the share of right exits is called, such as "accuracy".
        criteria: exit criteria to choose thresholds for.
        policy_inputs: what a policy may read.
        confidence: the criterion that says how sure an exit is, which needs no training.
        unused_parameters: whether steps leave parameters out.
    """

    config: TrainingConfig
    data: Any
    task: str
    suffix: str
    measure: str
    criteria: tuple[str, ...]
    policy_inputs: tuple[str, ...]
    confidence: str
    unused_parameters: bool

    def prepare(self, backbone: str | Path, task_name: str | None, *, exits: bool) -> Parts:
        """Load model and tokenizer and cut up the data."""
        ...

    def weighted_sum(self) -> Objective:
        """Every exit learns every instance."""
        ...

    def consistent(self) -> Objective:
        """An instance's loss comes from where it exits."""
        ...

    def last_layer(self) -> Objective:
        """The last layer's loss alone."""
        ...

    def fixed_parts(self, model: Any) -> None:
        """Put what no step trains into evaluation mode."""
        ...

    def exit_modules(self, model: Any) -> list[nn.Module]:
        """What belongs to the exits below the last layer, and to nothing else."""
        ...

    def warm_up_stops(self, run: Run, until: int) -> list[int]:
        """OptimizerSteps of the warm-up at which `observe` looks at the model; the last is its end."""
        ...

    def observe(self, run: Run) -> None:
        """Look at the model at one of `warm_up_stops`."""
        ...

    def policy_data(self, run: Run, description: str) -> PolicyInstances:
        """Run all layers for the instances of phase 2."""
        ...

    def new_policy(self, model: Any, policy_input: str) -> PolicyNetwork:
        """An untrained policy network."""
        ...

    def criterion_fits(self, model: Any, search: PolicySearch) -> Mapping[str, CriterionFit]:
        """What is fitted for other criteria in phase 2, by their names."""
        ...

    def install(self, model: Any, choice: PolicyChoice) -> None:
        """Put what phase 2 chose into the model."""
        ...

    def restore_policy(self, model: Any, policy_input: str) -> None:
        """Give the model a policy of this input, for weights that are to be loaded."""
        ...

    def first_figures(self, run: Run, data: PolicyInstances) -> dict[str, Any]:
        """What every exit knows after the first training, beside what guessing gives; the dead ones are named."""
        ...

    def validate(self, run: Run) -> dict[str, Any]:
        """Figures of the plain model on validation rows: `accuracy`, perhaps others, and `num_examples`."""
        ...

    def record(
        self, run: Run, data: PolicyInstances | None, choice: PolicyChoice | None, criterion: str
    ) -> dict[str, Any]:
        """The task's own part of the record: keys beside the shared ones, and further ones of `validation`.

        The criterion is the one that the saved model exits by; nothing without a choice.
        """
        ...

    def finish(self, run: Run, choice: PolicyChoice | None, criterion: str) -> Any:
        """Make the model one that can be saved and used with this criterion; returns what is saved."""
        ...


@dataclass
class Run:
    """A run's parts.

    Attributes:
        kind: what the record calls the model that comes out.
        task_name: name of the data set, for the record.
        parts: the task's model and data; `parts.model` is unwrapped.
        steps: the gradient steps.
        identity: what a resumed run must share with the one it goes on with.
        progress: all there is to remember beside weights and optimizer, as plain JSON values.
        warm_up_dir: where first steps are kept for trainings that begin alike; None where this one shares none.
        stage: steps behind all of `steps`, on other rows and with an optimizer of their own, while they are the ones
            that are taken.
        let_go: leaves the output folder to other runs; `save` calls it, and whoever stops the run before.
    """

    kind: str
    config: TrainingConfig
    task: TrainingTask
    task_name: str | None
    output_dir: Path
    report: Report
    parts: Parts
    accelerator: Accelerator
    steps: OptimizerSteps
    identity: dict[str, Any]
    progress: dict[str, Any]
    warm_up_dir: Path | None = None
    stage: OptimizerSteps | None = None
    let_go: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._left_in_stage: tuple[int, Any] | None = (
            None  # step and optimizer of a run that is resumed in one
        )
        parameters = self.model.named_parameters(remove_duplicate=False)
        self._frozen = {
            name
            for name, parameter in parameters
            if name.startswith("backbone.") and not parameter.requires_grad
        }

    @property
    def model(self) -> Any:
        """The model, without what accelerate wraps it in."""
        return self.parts.model

    @property
    def best_path(self) -> Path:
        """Where the best round's weights wait."""
        return self.output_dir / checkpoints.FOLDER / checkpoints.BEST

    @property
    def scratch_dir(self) -> Path:
        """Where large states are mapped."""
        return self.output_dir / checkpoints.FOLDER

    def say(self, message: str) -> None:
        """Show a line, once, whatever the number of processes."""
        if self.accelerator.is_main_process:
            self.report(message)

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, rounded; at least one unless there are no epochs."""
        return max(1, round(epochs * len(self.steps.batches))) if epochs else 0

    def take_steps(
        self, until: int, objective: Objective, *, phase: str, learning_rate: float | None = None
    ) -> None:
        """Take steps on an objective until so many are taken; by default at the configured learning rate."""
        (self.stage or self.steps).run(
            until,
            objective,
            phase=phase,
            learning_rate=learning_rate or self.config.learning_rate,
            before_step=lambda: self.task.fixed_parts(self.model),
        )

    def begin_stage(self, steps: OptimizerSteps) -> None:
        """From here on take steps of a further stage; a resumed run goes on where it left it."""
        steps.checkpoint = self.checkpoint
        self.stage = steps
        if self._left_in_stage is not None:
            steps.step, optimizer = self._left_in_stage
            self._load_optimizer(optimizer)
            self._left_in_stage = None
            self.say(f"Resumed at step {steps.step} of {steps.total_steps} behind the rounds.")

    def weights(self) -> dict[str, Tensor]:
        """All weights that training can have changed: everything but a backbone's frozen parameters."""
        return {name: value for name, value in self.model.state_dict().items() if name not in self._frozen}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put weights of this run into the model, whose policy may have got another input since the start."""
        if self.progress["policy_input"] is not None:
            self.task.restore_policy(self.model, self.progress["policy_input"])
        left_out = set(self.model.load_state_dict(weights, strict=False).missing_keys)
        if left_out - self._frozen or not weights.keys() <= self.model.state_dict().keys():
            raise ValueError(f"The weights kept in {self.output_dir} are not of this model. Start anew.")

    def from_main_process(self, value: T | None) -> T:
        """What the main process has, on every process."""
        if self.accelerator.num_processes > 1:
            (value,) = broadcast_object_list([value])
        return cast(T, value)

    def keep_best(self) -> None:
        """Remember the present weights as the best so far."""
        if self.accelerator.is_main_process:
            checkpoints.save_weights(self.best_path, self.weights())
        self.accelerator.wait_for_everyone()

    def load_best(self) -> None:
        """Go back to the weights that were the best; the policy stays as it is, to be fitted anew."""
        self.load_weights(self._with_own_policy(checkpoints.load_weights(self.best_path)))

    def _with_own_policy(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights, but for the policy's: those are the model's at present."""
        policy = {
            name: value for name, value in self.model.state_dict().items() if name.startswith("policy.")
        }
        return {name: value for name, value in weights.items() if not name.startswith("policy.")} | policy

    def checkpoint(self) -> None:
        """Make this moment one from which `resume` can go on."""
        if self.accelerator.is_main_process:
            self.progress["checkpoints"] += 1
            self.write_checkpoint(self.output_dir, self.identity)
        self.accelerator.wait_for_everyone()

    def write_checkpoint(self, folder: Path, identity: dict[str, Any]) -> None:
        """Write this moment down; the main process does.

        Args:
            folder: whose checkpoints it joins.
            identity: kept beside it.
        """
        scaler = self.accelerator.scaler
        steps = self.stage or self.steps
        optimizer = {
            "optimizer": steps.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoints.save_checkpoint(
            folder,
            self.progress["checkpoints"],
            weights=self.weights(),
            optimizer=optimizer,
            progress={
                **self.progress,
                "step": self.steps.step,
                "seconds": self.steps.seconds,
                **({} if self.stage is None else {"stage_step": self.stage.step}),
                "identity": identity,
            },
        )

    def restore(self, folder: Path, *, own_policy: bool = False) -> None:
        """Go back to a checkpoint's moment.

        Args:
            folder: the checkpoint's, of this very run, or of one that has had the same steps so far.
            own_policy: whether the policy, which steps do not train, stays this run's.
        """
        weights, optimizer, progress = checkpoints.load_checkpoint(folder)
        weights = self._with_own_policy(weights) if own_policy else weights
        del progress["identity"]
        self.steps.step, self.steps.seconds = progress.pop("step"), progress.pop("seconds", 0.0)
        stage_step = progress.pop("stage_step", None)
        self.progress.clear()
        self.progress.update(progress)
        self.load_weights(weights)
        if stage_step is not None:
            self._left_in_stage = stage_step, optimizer  # for the stage's own steps, when they are there
            return
        self._load_optimizer(optimizer)
        self.say(f"Resumed at step {self.steps.step} of {self.steps.total_steps}.")

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        (self.stage or self.steps).optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def save(self, model: Any, record: dict[str, Any]) -> Path:
        """Write a finished model with its record and card, then remove the checkpoints.

        Everything is first written beside its place. The record is moved last: a folder with a record is complete.

        Args:
            model: what is written, by its `save_pretrained`.
            record: figures, for the record.
        """
        if self.accelerator.is_main_process:
            record = {
                "kind": self.kind,
                "task": self.task_name,
                "method": self.identity["method"],
                "backbone": self.identity["backbone"],
                "backbone_fingerprint": self.identity["backbone_fingerprint"],
                "config": self.config.to_dict(),
                "data": self.identity["data"],
                "environment": environment(self.accelerator.device, self.config.seed)
                | {
                    "accelerate": version("accelerate"),
                    "processes": self.accelerator.num_processes,
                    "mixed_precision": str(self.accelerator.mixed_precision),
                },
                **record,
            }
            staged = self.output_dir / checkpoints.FOLDER / checkpoints.STAGING
            with room_in(self.output_dir):
                model.save_pretrained(staged)
                self.parts.tokenizer.save_pretrained(staged)
                write_model_card(staged, record)
                write_json(staged / RECORD_FILE, record)
                checkpoints.place_model(self.output_dir, last=RECORD_FILE)
            checkpoints.remove_checkpoints(self.output_dir)
            self.let_go()
        self.accelerator.wait_for_everyone()
        if self.config.tracker != "none":
            for tracker in self.accelerator.trackers:  # `end_training` would also part the processes for good
                tracker.finish()
        self.say(f"Saved to {self.output_dir}")
        return self.output_dir

    def begin(self, newest: Path | None, *, resume: bool) -> None:
        """Claim the folder, plan the steps, start the tracker, and go back to the last checkpoint if there is one.

        Args:
            newest: that checkpoint.
            resume: whether the caller expects one.
        """
        config = self.config
        if self.accelerator.is_main_process:
            checkpoints.claim(self.output_dir)
        self.steps.total_steps = self.steps_of(config.warmup_epochs) + config.rounds * self.steps_of(
            config.consistent_epochs
        )
        self.steps.checkpoint = self.checkpoint
        if config.tracker != "none":
            values = config.to_dict()
            settings = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
            self.accelerator.init_trackers("consistentee", config=settings)
        self.say(
            f"{self.parts.description}, {self.steps.total_steps} steps, {self.accelerator.device}, precision "
            f"{self.accelerator.mixed_precision}"
        )
        if newest is not None:
            self.restore(newest)
        elif resume:
            self.say("No checkpoint to resume from: starting at the beginning.")
