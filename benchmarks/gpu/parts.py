"""The parts of ``scripts/gpu_acceptance.sh``: commands and shares of the time, most important first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """One measurement of a part.

    Attributes:
        name: name of its log and of its folder of tables.
        module: Python module.
        arguments: arguments of the module.
        share: share of the time, relative to other commands.
        ranks: processes; more than one start under torchrun.
        variables: environment variables; None unsets one.
        takes_budget: whether it takes ``--budget`` and ``--out``, as every module with a table does.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    share: float = 30.0
    ranks: int = 1
    variables: Mapping[str, str | None] = field(default_factory=dict)
    takes_budget: bool = True


@dataclass(frozen=True)
class Part:
    """A part of the acceptance.

    Attributes:
        name: word for ``--only``.
        title: heading in the results.
        commands: its measurements in order.
    """

    name: str
    title: str
    commands: tuple[Command, ...]


#: Megatron asserts it before Blackwell; it also orders the launches of all streams.
_ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_MANY_CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": None}


def parts(*, smoke: bool) -> tuple[Part, ...]:
    """Return every part; ``smoke`` has the same commands with fewer ranks, on a CPU."""
    few = 2 if smoke else 4
    peers = (2,) if smoke else (4, 2, 8)
    small = ("--smoke", "--device", "cpu") if smoke else ()

    def command(name: str, module: str, *arguments: str, **options: object) -> Command:
        return Command(name, f"benchmarks.gpu.{module}", (*arguments, *small), **options)

    return (
        Part(
            "schemes",
            f"Every scheme on {few} ranks of one card, and the teardown",
            (
                command("schemes-one-connection", "exact", share=45, ranks=few, variables=_ONE_CONNECTION),
                command("schemes-unset-connections", "exact", share=40, ranks=few, variables=_MANY_CONNECTIONS),
            ),
        ),
        Part(
            "training",
            "Megatron training against 1 rank: TransformerEngine's layers and Megatron's own",
            (command("training", "parity", share=170, variables=_ONE_CONNECTION),),
        ),
        Part(
            "job",
            "A usual job: sequence parallel, distributed optimizer, recomputation, checkpoint resumed, fp8",
            (command("job", "jobs", share=120, variables=_ONE_CONNECTION),),
        ),
        Part(
            "accuracy",
            "Tiles of each kernel against fp64",
            (command("accuracy", "accuracy", share=40),),
        ),
        Part(
            "graphs",
            f"CUDA graphs: every kind of tile, every scheme on {few} ranks of one card, replays against eager passes",
            (
                command("graph-tiles", "graph_tiles", share=15),
                command("graph-schemes", "graph_schemes", share=45, ranks=few, variables=_ONE_CONNECTION),
            ),
        ),
        Part(
            "speed",
            "Efficiency, tiles, memory, gaps",
            (
                command("efficiency", "efficiency", share=45),
                command("tiles", "tiles", share=25),
                command("memory", "memory", "--steps", "20", share=20),
                command("gaps", "gaps", share=15),
            ),
        ),
        Part(
            "activations",
            "A step's memory against the plan; outputs in host memory against the device; loss tiles beside PyTorch's",
            (
                command("step", "step", share=45),
                command("on-host", "on_host", share=40),
                command("loss-tiles", "loss_tiles", share=20),
            ),
        ),
        Part(
            "peers",
            "Other projects' context parallelism in the same run",
            tuple(
                command(f"peers-{ranks}", "peers", "--repeats", "3", share=30, ranks=ranks, variables=_ONE_CONNECTION)
                for ranks in peers
            ),
        ),
    )


#: Comes before the parts: versions of everything that the tables depend on.
MACHINE = Command("machine", "benchmarks.gpu.machine", share=10, takes_budget=False)
