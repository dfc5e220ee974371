"""The flags that are torchrun's, not Megatron's: how many ranks there are, and where they meet."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.entry import Setting

NODES, RANKS_PER_NODE, ENDPOINT, BACKEND = "--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--rdzv-backend"
COUNTS = (NODES, RANKS_PER_NODE)
RESTARTS = "--max-restarts"
#: PyTorch: each attempt has a store of its own, not the agent's.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
#: None of these is a flag of Megatron's, so that both kinds can stand on one command line.
FLAGS = (*COUNTS, "--node-rank", "--rdzv-id", BACKEND, ENDPOINT, RESTARTS, "--log-dir", "--tee", "--role")


def check_torchrun(setting: Setting) -> None:
    """Check one flag by itself.

    Raises:
        WallfacerError: it is none of :data:`FLAGS`, or a count that is not positive.
    """
    if setting.name not in FLAGS:
        raise WallfacerError(f"{setting.origin}: {setting.name}: must be one of {', '.join(FLAGS)}")
    (word,) = setting.words or ("",)
    if setting.name in COUNTS and not (word.isascii() and word.isdigit() and int(word) > 0):
        raise WallfacerError(f"{setting.origin}: {setting.name} {word}: must be a positive whole number")


def ranks(settings: Mapping[str, Setting]) -> int:
    """Ranks of the job; torchrun starts one where nothing is said."""
    return _count(settings, NODES) * ranks_per_node(settings)


def ranks_per_node(settings: Mapping[str, Setting]) -> int:
    """Return the ranks that torchrun starts on each node."""
    return _count(settings, RANKS_PER_NODE)


def words(settings: Mapping[str, Setting]) -> list[str]:
    """What follows ``torchrun``.

    Raises:
        WallfacerError: there are several nodes, and nothing says where they meet.
    """
    typed = [word for setting in settings.values() for word in setting.typed]
    if ENDPOINT in settings:
        return typed if BACKEND in settings else [*typed, BACKEND, "c10d"]
    if _count(settings, NODES) > 1:
        nodes = settings[NODES]
        raise WallfacerError(
            f"{nodes.origin}: {' '.join(nodes.typed)}: needs {ENDPOINT} HOST:PORT, the same on all nodes"
        )
    return ["--standalone", *typed]


def variables(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Return what torchrun needs for its flags: with restarts a new store for each attempt.

    Ranks of the attempt before are still in the agent's store, and gloo tries to connect to them.
    """
    restarts = settings.get(RESTARTS)
    on = restarts is not None and restarts.words is not None and restarts.words != ("0",)
    return {OWN_STORE: "1"} if on else {}


def _count(settings: Mapping[str, Setting], name: str) -> int:
    setting = settings.get(name)
    return int(setting.words[0]) if setting and setting.words else 1
