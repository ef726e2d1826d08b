"""Plain fine-tuning, one classifier or head at the top, by the same recipe: the reference for every claim.

Same rows, head, batches, learning rates and schedule as with exits, and as many steps as all phases of ConsistentEE
together; the epoch with the best validation accuracy is kept. What is saved is a model without exits.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.run import Run


def train_plain(run: Run) -> Path:
    """Fine-tune and save the best epoch."""
    task, progress = run.task, run.progress
    per_epoch, total = run.steps_of(1.0), run.steps.total_steps
    ends = [*range(per_epoch, total, per_epoch), total]
    unit = task.measure.removesuffix("accuracy")
    for number, end in list(enumerate(ends))[progress["rounds_done"] :]:
        run.take_steps(end, task.last_layer(), phase=f"epoch {number + 1}")
        figures = task.validate(run)
        shown = ", ".join(f"{name} {figures[name]:.4f}" for name in figures if name != "num_examples")
        run.say(f"Epoch {number + 1} of {len(ends)}: validation {unit}{shown}")
        progress["history"].append({"epoch": number + 1, **figures})
        if progress["best_score"] is None or figures["accuracy"] >= progress["best_score"]:
            progress.update(
                best_score=figures["accuracy"], best_round=number
            )  # of equals, the longer trained
            run.keep_best()
        progress["rounds_done"] = number + 1
        run.checkpoint()
    run.load_best()
    kept = dict(progress["history"][progress["best_round"]])
    del kept["epoch"]
    model = task.finish(run, None, "")
    return run.save(
        model, {"validation": kept, "history": progress["history"], **task.record(run, None, None, "")}
    )
