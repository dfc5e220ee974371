"""Training runs of the demonstration's model, on one rank and on ranks that share a card; their logs stay."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import warm
from benchmarks.gpu.report import device_of
from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.shipped import SCRIPT
from megatron_wallfacer.training_runs import demo, local_run

#: The same weights whatever the tensor-parallel size: drawn on the CPU and then split, with one padded vocabulary.
_SAME_WEIGHTS = ("--use-cpu-initialization", "--make-vocab-size-divisible-by", "256")
#: Appended in a smoke run: the last of two values holds.
_SMALL = ("--num-layers", "2", "--seq-length", "256", "--max-position-embeddings", "256")


class Trainer:
    """Trains under the plugin's launcher.

    Args:
        folder: folder for data and logs.
        iterations: training iterations of every run.
        options: smoke, device and backend.
    """

    def __init__(self, folder: Path, iterations: int, options: argparse.Namespace) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.on_gpu = device_of(options).type == "cuda"
        if not self.on_gpu:
            # Where there is a GPU the launcher takes it otherwise.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._start = warm.train if options.smoke else local_run.train
        if options.smoke:
            warm.prepare()
        small = _SMALL if options.smoke else ()
        self._common = [*demo.training_arguments(folder, iterations), *_SAME_WEIGHTS, *small]

    def losses(self, name: str, ranks: int, flags: Sequence[str]) -> list[float]:
        """Losses of all iterations of one run; its log is ``NAME.log`` in the folder.

        Raises:
            WallfacerError: it failed; with the last lines of its log.
        """
        log = self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
        arguments = [*self._common, *flags]
        if self.on_gpu:
            arguments = complete_for_gpu(arguments, Libraries.here())
        run = self._start(SCRIPT, ranks, arguments, log, lambda iteration: None)
        return [iteration.loss for iteration in run]
