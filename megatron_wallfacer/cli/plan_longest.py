"""The longest sequence as a table: its configuration, its flags, and what stops a longer one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.plan_flags import command_line, configuration_flags
from megatron_wallfacer.cli.plan_table import configuration_row, show_configurations

if TYPE_CHECKING:
    from megatron_wallfacer.planning.longest import Longest

#: Buffers that are named of a longer sequence.
LARGEST = 4


def show_longest(found: Sequence[Longest]) -> None:
    """Print one line per length, flags, and what stops longer ones."""
    show_configurations((one.configuration for one in found), lengths=True)
    for one in found:
        tokens = one.configuration.request.tokens
        print(f"\n{tokens:,} tokens: {command_line(configuration_flags(one.configuration))}")
        print(f"{one.unit:,} tokens more: {what_stops(one)}")


def longest_as_json(found: Sequence[Longest]) -> str:
    """Return the same as JSON."""
    return json.dumps(
        [
            {"tokens": one.configuration.request.tokens, **asdict(configuration_row(one.configuration))}
            | {"stops": what_stops(one)}
            for one in found
        ],
        indent=2,
    )


def what_stops(found: Longest) -> str:
    """Return what the next longer sequence needs, in the configuration with the least device memory."""
    from megatron_wallfacer.planning.inventory import peak

    needs = found.needs
    moment, nbytes = peak(needs.buffers)
    live = sorted((one for one in needs.buffers if moment in one.moments), key=lambda one: -one.nbytes)[:LARGEST]
    named = ", ".join(f"{one.name} {one.nbytes / 1e9:.1f}" for one in live)
    host_gb, step = needs.request.cluster.host_memory_gb, needs.step
    host = "" if host_gb is None else f"; {step.host_gb:.0f} of {host_gb:g} GB of host memory per node"
    return f"at least {nbytes / 1e9:.1f} GB per rank ({moment}: {named}){host}"
