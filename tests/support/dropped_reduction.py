"""Trains like scripts/pretrain_gpt.py, but one weight's gradient is left as each rank has it.

Megatron averages gradients over the data-parallel and context-parallel ranks together.
"""

import runpy
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

WEIGHT = "word_embeddings.weight"
right = DistributedDataParallel.finish_grad_sync


def finish_grad_sync(self: DistributedDataParallel, *args: object, **kwargs: object) -> None:
    weight = next(weight for name, weight in self.named_parameters() if name.endswith(WEIGHT))
    own = weight.main_grad.clone()
    right(self, *args, **kwargs)
    weight.main_grad.copy_(own)


DistributedDataParallel.finish_grad_sync = finish_grad_sync
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
