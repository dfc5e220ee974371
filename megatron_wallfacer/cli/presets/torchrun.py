"""The flags that are torchrun's, not Megatron's: how many ranks there are, and where they meet."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_wallfacer.cli.presets.setting import Setting
from megatron_wallfacer.errors import WallfacerError

NODES, RANKS_PER_NODE, ENDPOINT, BACKEND = "--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--rdzv-backend"
COUNTS = (NODES, RANKS_PER_NODE)
#: None of these is a flag of Megatron's, so that both kinds can stand on one command line.
FLAGS = (*COUNTS, "--node-rank", "--rdzv-id", BACKEND, ENDPOINT, "--max-restarts", "--log-dir", "--tee", "--role")


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


def _count(settings: Mapping[str, Setting], name: str) -> int:
    setting = settings.get(name)
    return int(setting.words[0]) if setting and setting.words else 1
