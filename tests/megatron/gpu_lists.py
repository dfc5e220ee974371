"""Shipped command lines as on a GPU machine, where there is none: validation, sample counts, kernel and model.

    python -m tests.megatron.gpu_lists    writes a line of JSON for each: `name`, `argv`, and what was found or `error`

The lists are those that `wallfacer demo`, `benchmarks.gpu.parity` and `wallfacer run` start with the libraries of this
environment. Torch claims to have CUDA, and what is asked onto a CUDA device becomes a meta tensor: models are built
whole, all layers and full size, and hold no memory. Rank 0 is built; its groups send nothing. All else is what the
launcher does on a GPU. Each list has a fork, because Megatron keeps state.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.schedule.grid import Grid
from tests.megatron.shipped_lists import List, shipped_lists
from tests.support.rank_server import _read_sources_once

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def pretend_cuda() -> None:
    """Let torch pass for a machine with CUDA; only the CPU runtime's device, nothing of what it does to Megatron."""
    before = os.environ.get(VARIABLE)
    from megatron_wallfacer.megatron.cpu_runtime import environment, tensors, torch_cuda

    for part in (environment, torch_cuda, tensors):
        part.install()
    tensors._HOST = torch.device("meta")
    os.environ.pop(VARIABLE)
    if before is not None:
        os.environ[VARIABLE] = before


def answer(one: List) -> dict[str, Any]:
    """Take one command line the way a rank does, up to its first step."""
    from megatron_wallfacer.megatron import launcher
    from megatron_wallfacer.megatron.plugin_state import PluginState
    from megatron_wallfacer.megatron.version import megatron_version

    os.environ.update(one.variables | {"WORLD_SIZE": str(one.ranks), "RANK": "0", "LOCAL_RANK": "0"})
    kernels = []
    choose = PluginState.kernel
    PluginState.kernel = lambda *args: kernels.append(choose(*args)) or kernels[-1]
    PluginState.connect = lambda self, group: self.axis_groups.append(_unconnected(self.settings.plan.grid))
    PluginState.transfers = lambda self, group, grid: Transfers(_unconnected(grid))
    device, argv = launcher._choose_device(list(one.argv))
    assert (device, argv) == ("cuda", list(one.argv)), "the launcher must leave a GPU's command line as it is typed"
    launcher._install_hooks(megatron_version(), device)
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()  # as rank 0 does before it reads data; the wheel has no Makefile, and Megatron's own exits
    sys.argv = ["pretrain_gpt.py", *argv]
    args, samples = _validated()
    model = _built(args)
    attention = [module for name, module in model.named_modules() if name.endswith("self_attention.core_attention")]
    modules = {type(module).__module__.partition(".")[0] for module in model.modules()}
    return {
        "dp": args.data_parallel_size,
        "cp": args.context_parallel_size,
        "samples": samples,
        "kernel": kernels[-1].name if kernels else None,
        "fused softmax": args.masked_softmax_fusion,
        "layers": len(attention),
        "plugin": sum("Wallfacer" in type(module).__name__ for module in attention),
        "modules": sorted(modules),
        "marked": sum(getattr(parameter, "sequence_parallel", False) for parameter in model.parameters()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _unconnected(grid: Grid) -> AxisGroups:
    """Groups that send nothing have no axes."""
    return AxisGroups(grid, 0, tuple(range(grid.cp_size)), ("node",) * grid.cp_size, {})


def _validated() -> tuple[Any, list[int]]:
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import set_args
    from megatron.training.training import get_train_valid_test_num_samples

    args = parse_and_validate_args()
    set_args(args)
    args.iteration = 0
    return args, list(get_train_valid_test_num_samples())


def _built(args: Any) -> torch.nn.Module:
    """The model of rank 0."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(args.seed)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args)).model
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_model(groups)


def main() -> None:
    """Try every list; Megatron prints on stdout, so that goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lists = list(shipped_lists())
    pretend_cuda()
    import megatron.core.tokenizers.text  # most of Megatron, once for all
    import megatron.training  # noqa: F401

    import megatron_wallfacer.megatron.hooks  # noqa: F401

    _read_sources_once()
    for one in lists:
        pid = os.fork()
        if pid == 0:
            try:
                found = answer(one)
            except BaseException as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"name": one.name, "argv": one.argv, **found}) + "\n")
            answers.flush()
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
