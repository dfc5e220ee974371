"""CPU ranks train where TransformerEngine can be imported: Megatron does not find it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.optional import TRANSFORMER_ENGINE, UnavailableError
from megatron_wallfacer.megatron.cpu_runtime import libraries
from megatron_wallfacer.shipped import SCRIPT
from megatron_wallfacer.training_runs.training_log import parse_iteration
from tests.megatron.training import arguments
from tests.support.job_store import job_store

REPOSITORY = Path(__file__).parents[3]
STAND_INS = REPOSITORY / "tests" / "support" / "stand_ins"
TRAINING = [*arguments(iterations=2), "--use-distributed-optimizer", "--wallfacer-cp-size", "1"]


def train_on_the_cpu(*folders: Path) -> list[float]:
    """Losses of two iterations on one rank, the launcher's way, with these folders in front of what is installed."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with job_store() as rendezvous:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "megatron_wallfacer", str(SCRIPT), *TRAINING],
            cwd=REPOSITORY,
            env=os.environ | ranks | rendezvous | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "wallfacer: 2 of 2 attention layers" in done.stdout
    return [iteration.loss for line in done.stdout.splitlines() if (iteration := parse_iteration(line))]


def check(losses: list[float]) -> None:
    assert len(losses) == 2
    assert all(5 < loss < 7 for loss in losses)  # log 257 = 5.5 and what a random start adds


def test_cpu_ranks_train_beside_a_library_that_raises_on_cpu_tensors() -> None:
    """A stand-in: all of it that Megatron takes at import would raise in the first iteration."""
    check(train_on_the_cpu(STAND_INS))


@pytest.mark.transformer_engine
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="TransformerEngine is not installed here"
)
def test_cpu_ranks_train_beside_transformer_engine() -> None:
    check(train_on_the_cpu())


@pytest.fixture
def apex() -> Iterator[None]:
    """A library that is imported already, with a part of it. What was imported is back after the test."""
    before = dict(sys.modules)
    sys.modules.update({name: ModuleType(name) for name in ("apex", "apex.optimizers")})
    yield
    for name in libraries.HIDDEN:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.usefixtures("apex")
def test_what_is_hidden_cannot_be_imported() -> None:
    libraries.install()
    for name in ("apex", "apex.optimizers", "apex.contrib"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert importlib.util.find_spec("apex") is None
    if importlib.util.find_spec("transformer_engine") is None:
        assert "transformer_engine" not in sys.modules or sys.modules["transformer_engine"] is None
    importlib.import_module("json")


def test_it_is_too_late_once_megatron_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = ModuleType("megatron.core.extensions.transformer_engine")
    bound.HAVE_TE = True
    monkeypatch.setitem(sys.modules, bound.__name__, bound)
    with pytest.raises(WallfacerError, match=r"import megatron_wallfacer\.auto before Megatron"):
        libraries.install()


def test_a_kernel_says_that_its_library_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(UnavailableError, match=r"transformer-engine.* does not run on the CPU"):
        TRANSFORMER_ENGINE.load()
