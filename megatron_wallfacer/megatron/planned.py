"""``--wallfacer-cluster``: the grid that is fastest on a cluster description, found before the job starts."""

from __future__ import annotations

import argparse
import os

import torch

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.cluster_file import cluster_of_gpus, load_cluster
from megatron_wallfacer.planning.search import search
from megatron_wallfacer.planning.training_step import cluster_of_group
from megatron_wallfacer.schedule.volume import Shape

#: In place of a cluster's name: the hosts that the job runs on.
HOSTS = "hosts"
#: What the planner decides, and what each says when it was not asked for.
DECIDED = {
    "scheme": "auto",
    "head_size": None,
    "team_size": None,
    "kv_team_size": None,
    "ring_inner_size": None,
    "placement": None,
    "kv_order": None,
    "forward": "auto",
    "backward": "auto",
    "bidirectional": False,
    "head_groups": None,
    "keep_gathered_q": False,
}


def planned(args: argparse.Namespace, shape: Shape) -> Choice:
    """The fastest choice for a job on ``--wallfacer-cluster``. The same on every rank: nothing is measured.

    Args:
        args: Megatron's, with the flag.
        shape: of a rank's shard.

    Raises:
        WallfacerError: the file is wrong, the cluster too small, or something of the plan was given by hand.
    """
    name, tensor, size = args.wallfacer_cluster, args.tensor_model_parallel_size, args.wallfacer_cp_size
    for option, default in DECIDED.items():
        value = getattr(args, f"wallfacer_{option}")
        if value != default:
            shown = f"--wallfacer-{option.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise WallfacerError(f"{shown}: must be left out with --wallfacer-cluster {name}, which decides it")
    try:
        cluster = _hosts_of_job() if name == HOSTS else load_cluster(name)
    except OptionError as error:
        raise WallfacerError(f"--wallfacer-cluster {name}: must be {error.allowed}") from error
    if cluster.ranks < tensor * size:
        raise WallfacerError(
            f"--wallfacer-cluster {name}: must have {tensor * size} devices for --wallfacer-cp-size {size} "
            f"and tensor parallelism {tensor}, it has {cluster.ranks}"
        )
    if cluster.gpus_per_node % tensor:
        raise WallfacerError(
            f"--wallfacer-cluster {name}: must have nodes that --tensor-model-parallel-size {tensor} divides, "
            f"they have {cluster.gpus_per_node} devices"
        )
    return search(
        AttentionJob(cluster_of_group(cluster, tensor), shape, size, cuda_graphs=args.wallfacer_cuda_graphs)
    ).best[0]


def _hosts_of_job() -> Cluster:
    """As torchrun says and the GPUs are called.

    Raises:
        OptionError: torchrun does not say, hosts have unlike numbers of ranks, or no preset is of such GPUs.
    """
    ranks, on_each = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not on_each or ranks % on_each:
        said = f"{ranks} ranks, {on_each} on this host"
        raise OptionError("hosts", said, f"a name or a file: torchrun says {said}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    try:
        return cluster_of_gpus(gpu, ranks // on_each, on_each)
    except OptionError as error:
        raise OptionError("hosts", gpu, f"a name or a file: the GPU here is {gpu}, not {error.allowed}") from error
