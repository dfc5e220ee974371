"""Trains like scripts/pretrain_gpt.py; prints the record of copies, and bytes of the device that steps held, as JSON.

Host memory is allocated before the first step, so everything that a step allocates is on the device.
"""

import json
import os
import runpy
from pathlib import Path

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_layer import TransformerLayer

from benchmarks.memory.live import LiveBytes
from megatron_wallfacer.megatron.host_memory import prepare
from megatron_wallfacer.offload.copies import DeferredCopies
from megatron_wallfacer.offload.queue import OffloadQueue, Stored

#: Direction whose waits are left out: the negative control.
FORGOTTEN = os.environ.get("OFFLOADED_WITHOUT_WAIT")
#: What happened: name, number, addresses or key, number of earlier copies; as Record.
records: list[list] = []
peaks: list[int] = []
#: Bytes of the smallest storage that is counted.
SMALLEST = 1 << 13


class Copies(DeferredCopies):
    def __init__(self) -> None:
        super().__init__(lambda record: records.append(list(record)))
        self._of: dict[int, str] = {}

    def copy(self, direction: str, *args: object) -> object:
        issued = super().copy(direction, *args)
        self._of[issued.number] = direction
        return issued

    def wait(self, issued: object) -> None:
        if self._of[issued.number] != FORGOTTEN:
            super().wait(issued)


def measured(get_function):
    def get_forward_backward_func(*args, **kwargs):
        run = get_function(*args, **kwargs)

        def step(*args, **kwargs):
            records.append(["step", 0, [], None])
            parameters = [one for chunk in kwargs["model"] for one in chunk.parameters()]
            slots = [queue._slots._memory for queue in queues]
            known = [*parameters, *(one.main_grad for one in parameters), *slots]
            counted = LiveBytes(known, SMALLEST)
            counted.moment = "step"
            with counted:
                result = run(*args, **kwargs)
            peaks.append(counted.peaks["step"].nbytes)
            return result

        return step

    return get_forward_backward_func


def layer_begins(module: TransformerLayer, *_: object) -> None:
    records.append(["layer", module.layer_number, [], None])


queues: list[OffloadQueue] = []
make, store, load = OffloadQueue.__init__, OffloadQueue.store, OffloadQueue.load


def made(queue: OffloadQueue, *args: object) -> None:
    make(queue, *args)
    queues.append(queue)


def noted_store(queue: OffloadQueue, *args: object) -> Stored:
    entry = ["store", queues.index(queue), [], None]
    records.append(entry)
    stored = store(queue, *args)
    entry[2] = list(stored.key)
    return stored


def noted_load(queue: OffloadQueue, stored: Stored) -> tuple:
    records.append(["load", queues.index(queue), list(stored.key), None])
    return load(queue, stored)


OffloadQueue.__init__, OffloadQueue.store, OffloadQueue.load = made, noted_store, noted_load
build = TransformerLayer.__init__


def built(layer: TransformerLayer, *args: object, **kwargs: object) -> None:
    build(layer, *args, **kwargs)
    layer.register_forward_pre_hook(layer_begins)


TransformerLayer.__init__ = built
prepare.copies_of = lambda device: Copies()
schedules.get_forward_backward_func = measured(schedules.get_forward_backward_func)
import megatron.training.training as training  # noqa: E402

training.get_forward_backward_func = schedules.get_forward_backward_func
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
print("offloaded", json.dumps({"records": records, "peaks": peaks}), flush=True)
