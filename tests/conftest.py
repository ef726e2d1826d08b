"""What every test runs under: no network, no progress bars, no cache of the user's, one seed."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read once when the Hugging Face libraries are imported, so set before. HF_HUB_OFFLINE=0 in the shell wins.
_HF_HOME = tempfile.TemporaryDirectory(prefix="consistentee-tests-")
os.environ["HF_HOME"] = _HF_HOME.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker: threads of several would fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from browser import Browser, find_browser  # noqa: E402

# The same examples everywhere, no deadlines: these machines are slow at times.
settings.register_profile(
    "consistentee",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("consistentee")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_unconfigure() -> None:
    _HF_HOME.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's and Python's generators before every test.

    Returns:
        The seed, for a generator of the test's own.
    """
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Forget accelerate's process-wide device and precision after a test, so that the next may choose its own."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of models and data sets beside the repository; the test is skipped where there is none."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the data folder {path.name}/ beside the repository")
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium; tests without one are skipped."""
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of text generators, whose tokens must not depend on how sums are split among threads."""
    from tiny_decoders import single_thread

    with single_thread():
        yield
