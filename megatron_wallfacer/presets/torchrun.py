"""Check and convert torchrun's flags in a preset: number of ranks, rendezvous, restarts, logs."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.entry import PresetEntry

NODES, RANKS_PER_NODE, ENDPOINT, BACKEND = "--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--rdzv-backend"
COUNTS = (NODES, RANKS_PER_NODE)
RESTARTS = "--max-restarts"
#: PyTorch variable with which each attempt of a restarted job uses a new store instead of the agent's store.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
#: Flags of torchrun, none of which Megatron has. So one command line can contain flags of torchrun and Megatron.
FLAGS = (*COUNTS, "--node-rank", "--rdzv-id", BACKEND, ENDPOINT, RESTARTS, "--log-dir", "--tee", "--role")


def check_torchrun(entry: PresetEntry) -> None:
    """Check one torchrun flag.

    Raises:
        WallfacerError: The flag is not in :data:`FLAGS`, or a count is not positive.
    """
    if entry.name not in FLAGS:
        raise WallfacerError(f"{entry.location}: {entry.name}: must be one of {', '.join(FLAGS)}")
    (value,) = entry.values or ("",)
    if entry.name in COUNTS and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise WallfacerError(f"{entry.location}: {entry.name} {value}: must be a positive whole number")


def ranks(entries: Mapping[str, PresetEntry]) -> int:
    """Return the number of ranks of the job. torchrun's default is 1."""
    return _count(entries, NODES) * ranks_per_node(entries)


def ranks_per_node(entries: Mapping[str, PresetEntry]) -> int:
    """Return the number of ranks that torchrun starts on each node."""
    return _count(entries, RANKS_PER_NODE)


def torchrun_arguments(entries: Mapping[str, PresetEntry]) -> list[str]:
    """Return the arguments of torchrun.

    Raises:
        WallfacerError: The job has several nodes but no rendezvous endpoint.
    """
    arguments = [argument for entry in entries.values() for argument in entry.arguments]
    if ENDPOINT in entries:
        return arguments if BACKEND in entries else [*arguments, BACKEND, "c10d"]
    if _count(entries, NODES) > 1:
        nodes = entries[NODES]
        raise WallfacerError(
            f"{nodes.location}: {' '.join(nodes.arguments)}: needs {ENDPOINT} HOST:PORT, the same on all nodes"
        )
    return ["--standalone", *arguments]


def torchrun_variables(entries: Mapping[str, PresetEntry]) -> dict[str, str]:
    """Return environment variables that must be set because of torchrun's flags.

    If torchrun may restart the ranks, the variable ``OWN_STORE`` gives each attempt a new store.
    Without a new store, gloo would find the ranks of the previous attempt in the agent's store and connect to them.
    """
    entry = entries.get(RESTARTS)
    restarts = entry is not None and entry.values is not None and entry.values != ("0",)
    return {OWN_STORE: "1"} if restarts else {}


def _count(entries: Mapping[str, PresetEntry], name: str) -> int:
    entry = entries.get(name)
    return int(entry.values[0]) if entry and entry.values else 1
