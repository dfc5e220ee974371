"""Choose the fastest grid on a modelled cluster before the job starts: ``--wallfacer-cluster``."""

from __future__ import annotations

import argparse
import os

import torch

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.flags import FLAGS, PLAN_OPTIONS, Flags
from megatron_wallfacer.megatron.model_shape import dtype_of, head_dim, shape_of
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.cluster_file import cluster_of_gpus, load_cluster
from megatron_wallfacer.planning.search import search
from megatron_wallfacer.planning.training_step import cluster_of_group

#: Value of the flag that selects the nodes of the job.
HOSTS = "hosts"
#: Flags that the planner chooses.
CHOSEN = (*PLAN_OPTIONS, "keep_gathered_q")


def planned(flags: Flags, args: argparse.Namespace) -> Choice:
    """Return the plan with nearly the least predicted time on the cluster of ``--wallfacer-cluster``.

    All ranks get equal plans.

    Raises:
        WallfacerError: The cluster cannot be read or is too small, a flag sets a value that the planner chooses, or the
            command line lacks a model size.
    """
    name, size, tensor = flags.cluster, flags.cp_size, args.tensor_model_parallel_size
    if args.seq_length is None or head_dim(args) is None:
        raise WallfacerError(f"--wallfacer-cluster {name}: needs --seq-length and --hidden-size on the command line")
    for spec in FLAGS:
        value = getattr(flags, spec.field)
        if spec.field in CHOSEN and value != spec.default:
            raise WallfacerError(
                f"{spec.typed(value)}: must be left out, because --wallfacer-cluster {name} chooses it"
            )
    try:
        cluster = _hosts_of_job() if name == HOSTS else load_cluster(name)
    except OptionError as error:
        raise WallfacerError(f"--wallfacer-cluster {name}: must be {error.allowed}") from error
    if cluster.ranks < tensor * size:
        raise WallfacerError(
            f"--wallfacer-cluster {name}: must have {tensor * size} devices for --wallfacer-cp-size {size} "
            f"and tensor parallelism {tensor}, but has {cluster.ranks}"
        )
    if cluster.gpus_per_node % tensor:
        raise WallfacerError(
            f"--wallfacer-cluster {name}: has {cluster.gpus_per_node} devices per node, which must be a multiple of "
            f"--tensor-model-parallel-size {tensor}"
        )
    group, shape = cluster_of_group(cluster, tensor), shape_of(args, dtype_of(args))
    return search(AttentionJob(group, shape, size, cuda_graphs=flags.cuda_graphs)).best[0]


def _hosts_of_job() -> Cluster:
    """Return the cluster of the job, from torchrun's variables and the name of the GPU."""
    ranks, on_each = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not on_each or ranks % on_each:
        said = f"{ranks} ranks, {on_each} on this host"
        raise OptionError("hosts", said, f"the name or file of a cluster: torchrun reports {said}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    try:
        return cluster_of_gpus(gpu, ranks // on_each, on_each)
    except OptionError as error:
        raise OptionError("hosts", gpu, f"the name or file of a cluster: GPU {gpu} is not {error.allowed}") from error
