"""What draws tokens: draws of a generator's own, whatever other threads and processes draw."""

from __future__ import annotations

import os
from threading import Event, Thread

import pytest
import torch
from torch import Tensor

from consistentee.inference.decoder.draws import drawing_from


def expected_from(seed: int) -> Tensor:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


def test_threads_do_not_mix_their_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    inside, left = Event(), Event()
    theirs: list[Tensor] = []

    def other() -> None:
        with drawing_from(torch.Generator().manual_seed(2)):
            inside.set()
            assert left.wait(60)
            theirs.append(torch.rand(3))

    thread = Thread(target=other)
    with drawing_from(torch.Generator().manual_seed(1)):
        thread.start()
        inside.wait(0.5)  # it must not come in
        ours = torch.rand(3)
    left.set()
    thread.join()
    assert torch.equal(ours, expected_from(1))
    assert torch.equal(theirs[0], expected_from(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_inside_draws() -> None:
    with drawing_from(torch.Generator().manual_seed(1)):
        with drawing_from(torch.Generator().manual_seed(2)):
            inner = torch.rand(3)
        outer = torch.rand(3)
    assert torch.equal(inner, expected_from(2))
    assert torch.equal(outer, expected_from(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent() -> None:
    inside, done = Event(), Event()

    def other() -> None:
        with drawing_from(torch.Generator().manual_seed(2)):
            inside.set()
            assert done.wait(60)

    thread = Thread(target=other)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if not child:
        finished = Event()

        def draw() -> None:
            with drawing_from(torch.Generator().manual_seed(1)):
                finished.set()

        Thread(target=draw, daemon=True).start()
        os._exit(0 if finished.wait(20) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
