"""One combination: its ranks and its command lines, with the plugin and at context-parallel size 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

from tests.composition.features import FLAGS, MEGATRONS, MODEL, OURS, SPACE, pipeline_size, plan_options
from tests.composition.pairs import Row, cover, place_lightly

#: Sequences of an iteration by data-parallel rank; two micro-batches where they are more than one.
_SEQUENCES = {"single": 1, "accumulated": 2, "pairs": 4}


@dataclass(frozen=True)
class Run:
    """What is handed to `tests.support.megatron_runs.train`.

    Attributes:
        ranks: processes.
        flags: Megatron's, without data and length of the training.
        documents: level of that factor: which data.
    """

    ranks: int
    flags: tuple[str, ...]
    documents: str

    def with_flags(self, *flags: str) -> Run:
        return replace(self, flags=(*self.flags, *flags))


@dataclass(frozen=True)
class Combination:
    """A row of the cover.

    Attributes:
        number: 1-based, as printed.
        row: factor -> level.
    """

    number: int
    row: Row

    @property
    def cp_size(self) -> int:
        return int(self.row["cp"])

    @property
    def scheme(self) -> str:
        return self.row["scheme"]

    @property
    def dtype(self) -> str:
        return self.row["dtype"]

    @property
    def global_batch(self) -> int:
        """Sequences of one iteration: both runs get as many micro-batches, or more of them."""
        single = self.row["batch"] == "single"
        replicas = int(self.row["data"]) if single else max(int(self.row["data"]), self._whole_replicas)
        return _SEQUENCES[self.row["batch"]] * replicas

    @property
    def _whole_replicas(self) -> int:
        """Data-parallel ranks at context-parallel size 1: as few as expert parallelism lets there be."""
        # The ranks of a tensor-parallel group do not count: the experts are split among them too.
        return 2 if self.row["experts"] == "moe-ep2" else 1

    @cached_property
    def _model_parallel(self) -> int:
        return int(self.row["tensor"]) * pipeline_size(self.row["pipeline"])

    @cached_property
    def _flags(self) -> tuple[str, ...]:
        """Of both runs."""
        micro_batch = 2 if self.row["batch"] == "pairs" else 1
        batch = f"--micro-batch-size {micro_batch} --global-batch-size {self.global_batch}".split()
        chosen = [flag for factor, level in self.row.items() for flag in FLAGS[factor][level].split()]
        return (*MODEL, *batch, *chosen)

    @property
    def split(self) -> Run:
        """With the plugin."""
        options = [
            word
            for name, value in plan_options(self.scheme).items()
            for word in (f"--wallfacer-{name.replace('_', '-')}", str(value))
        ]
        return self._run(self._split_ranks).with_flags(
            *("--wallfacer-cp-size", str(self.cp_size), "--wallfacer-scheme", self.scheme),
            *options,
            *self._extra(OURS),
        )

    def _run(self, ranks: int) -> Run:
        return Run(ranks, self._flags, self.row["documents"])

    def _extra(self, flags: dict[str, dict[str, str]]) -> list[str]:
        """What some levels add to one of the two runs."""
        return [word for factor, levels in flags.items() for word in levels.get(self.row[factor], "").split()]

    @property
    def _split_ranks(self) -> int:
        return self._model_parallel * int(self.row["data"]) * self.cp_size

    @property
    def whole(self) -> Run:
        """The same at context-parallel size 1, without the plugin where Megatron's own attention can.

        The sequences of an iteration are the same.
        """
        run = self._run(self._model_parallel * self._whole_replicas)
        if self.megatron_can:
            return run.with_flags(*self._extra(MEGATRONS))
        documents = self._extra({"documents": OURS["documents"]})
        return run.with_flags("--wallfacer-cp-size", "1", "--wallfacer-kernel", "reference", *documents)

    @property
    def megatron_can(self) -> bool:
        """Whether Megatron's own attention has all of it on a CPU, and in the same numbers.

        Conversations not, documents and a window not. A mask as a tensor reaches the first and the last stage only: in
        those between, which interleaving makes of two ranks, documents would see each other. With such a mask rotary
        angles are those of the place in the sequence, packed those of the place in the document: the same scores, but
        in bf16 rounded otherwise.
        """
        documents, rotary = self.row["documents"], self.row["positions"] == "rope"
        if documents == "masked":
            between = self.row["pipeline"] == "interleaved"
            return self.row["attention"] != "window" and not between and not (self.dtype == "bf16" and rotary)
        return documents == "one"

    @property
    def weight(self) -> float:
        """How long it takes in bf16, roughly: runs, times micro-batches, stages and documents of a run."""
        in_bf16 = Combination(self.number, self.row | {"dtype": "bf16"})
        runs = 9 if self.row["experts"] != "dense" or not in_bf16.megatron_can else 5
        single, flat = self.row["batch"] == "single", self.row["pipeline"] != "interleaved"
        return runs * 2 ** sum((not single, not flat, self.row["documents"] == "conversations"))

    def __str__(self) -> str:
        """The levels that are not what every factor begins with."""
        said = [
            level if factor in ("experts", "heads", "batch") else f"{factor} {level}"
            for factor, level in self.row.items()
            if factor not in ("dtype", "cp", "scheme") and level != next(iter(FLAGS[factor]))
        ]
        return ", ".join(said) or "nothing else"


#: The seed of the cover: of the first few, one that gives few rows.
COVER_SEED = 3


@cache
def combinations_of_cover() -> tuple[Combination, ...]:
    """Every combination of the matrix, the same ones each time."""
    # A combination in bf16 is trained five to nine times, one in fp32 two or three times.
    rows = cover(SPACE, seed=COVER_SEED)
    rows = place_lightly(SPACE, rows, "dtype", "bf16", lambda row: Combination(0, row).weight)
    return tuple(Combination(number, row) for number, row in enumerate(rows, 1))
