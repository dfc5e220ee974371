"""Add the plugin's flags to Megatron's parser, and check the flags directly after parsing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_wallfacer.megatron.agreement.start import Parsed
from megatron_wallfacer.megatron.auto_tiles import choose_tiles
from megatron_wallfacer.megatron.flags import Flags, add_arguments
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.model_shape import dtype_of, head_dim, v_head_dim
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED
from megatron_wallfacer.megatron.settings import settings_from
from megatron_wallfacer.megatron.unsupported import check_supported

Parser = argparse.ArgumentParser


@partial(
    Hook,
    name="arguments",
    purpose="adds the flags of the plugin, and checks them right after parsing",
    target="megatron.training.arguments:add_megatron_arguments",
    since=FIRST_HOOKED,
    parameters=("parser",),
)
def arguments_hook(state: PluginState, original: Callable[[Parser], Parser], parser: Parser) -> Parser:
    """Add the flags of the plugin to Megatron's, and turn the plugin on after parsing if the flags say so."""
    parser = original(parser)
    add_arguments(parser)
    parse = parser.parse_known_args

    # parse_args calls parse_known_args, so the wrapper runs for both. It runs before Megatron's own validation and
    # before --yaml-cfg can replace the result.
    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse(*args, **kwargs)
        _accept(state, namespace)
        return namespace, rest

    parser.parse_known_args = parse_known_args
    return parser


def _accept(state: PluginState, args: argparse.Namespace) -> None:
    state.args, state.parsed, flags = args, Parsed.of(args), Flags.of(args)
    if not flags.is_on():
        return
    settings = settings_from(args)
    check_supported(args)
    state.turn_on(*choose_tiles(settings, args))
    if (channels := head_dim(args)) is not None:
        # An unsupported head dim stops the run now, not when the model is built.
        state.kernel(dtype_of(args), channels, v_head_dim(args))
    args.context_parallel_size = flags.cp_size
    if flags.transfers == "staged" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        share_gpus(args, state.device)
    state.switch_on()


def share_gpus(args: argparse.Namespace, device: torch.device) -> None:
    """Assign ranks to the node's GPUs in turn if there are more ranks than GPUs.

    Without this function Megatron uses the local rank as the index of the GPU.
    """
    if device.type == "cuda":
        args.local_rank %= torch.cuda.device_count()
