"""Exits for a model that is not to change, from texts alone.

    stage 1   the exits learn the model's own distribution from states of its layers; backbone and head are frozen
              (or, with `tune_backbone`, learn it too: the targets are those of the model before)
    stage 2   the policy, on texts the exits did not learn from; an error is an exit that disagrees with the model

Nobody needs labels, so the policy can learn from as many rows as there are.

Source: ours. Distilling a model into exits of its own is BERxiT's and Zero Time Waste's setting with frozen backbones
(arXiv:2106.05409); the reward for agreement is new.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.cached_states import CachedStates
from consistentee.training.policy_phase import finish_run, record_round, run_policy_phase
from consistentee.training.run import Run


def train_retrofit(run: Run) -> Path:
    """Train by both stages and save."""
    if run.steps.step < run.steps.total_steps:
        if isinstance(rows := run.parts.train_rows, CachedStates):
            rows.folder = run.scratch_dir
            rows.load_for(run.steps.step, shown=run.accelerator.is_main_process)
        run.take_steps(run.steps.total_steps, run.task.weighted_sum(), phase="exits")
        run.checkpoint()
    phase = run_policy_phase(run, "policy", try_all=True)
    record_round(run, 0, phase)
    return finish_run(run, phase)
