"""A combination of arguments that the plugin does not support: what finds it, and its error message.

Finders for one flag or a pair of flags come first, then those that read several of Megatron's arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from megatron_wallfacer.megatron.flag_group import attribute_of
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.releases import Number, version_text
from megatron_wallfacer.schedule.mask import NO_LIMIT

#: Function of the checked object and of the words on the command line. It returns flag and value as typed where the
#: combination is present, else None. It treats an attribute that a Megatron release lacks as not given.
Find = Callable[[Any, Sequence[str]], str | None]
#: What is checked: Megatron's parsed arguments before the first step, the TransformerConfig of a layer when the layer
#: is built, the PackedSeqParams (else the TransformerConfig) of a call.
When = Literal["parse", "model", "call"]

#: Attributes of flags that are not named after their attribute.
_ATTRIBUTES = {"--fp8-format": "fp8", "--fp4-format": "fp4"}


@dataclass(frozen=True)
class Combination:
    """One unsupported combination: a check, a row of docs/unsupported.md and a test case.

    Attributes:
        example: arguments that have the combination at ``--wallfacer-cp-size 8`` on eight ranks, as typed, the flag
            that the error names first; for a layer and a call ``attribute=value``.
        find: finds the combination.
        must: allowed values, as the words after "must"; ``{cp_size}`` stands for P.
        reason: clause after "because".
        instead: alternative as an imperative; empty where ``must`` says all.
        when: checked objects.
        distributed_only: whether P = 1 is supported.
        before: first Megatron release that supports the combination; None where none does.
        also: other spellings of the example, without rows of their own.
    """

    example: str
    find: Find
    must: str
    reason: str
    instead: str = ""
    when: tuple[When, ...] = ("parse",)
    distributed_only: bool = False
    before: Number | None = None
    also: tuple[str, ...] = ()

    def allowed(self, cp_size: int) -> str:
        """Return what is allowed, as the words after "must"."""
        release = "" if self.before is None else f" before Megatron {version_text(self.before)}"
        return self.must.replace("{cp_size}", str(cp_size)) + release

    def message(self, named: str, cp_size: int) -> str:
        """Return the error message.

        Args:
            named: flag and value as typed.
            cp_size: P.
        """
        instead = f" ({self.instead})" if self.instead else ""
        return f"{named}: must {self.allowed(cp_size)}, because {self.reason}{instead}"


def _attribute(flag: str) -> str:
    """Return the attribute of Megatron's arguments that has the value of a flag."""
    return _ATTRIBUTES.get(flag, attribute_of(flag))


def is_typed(argv: Sequence[str], flag: str) -> bool:
    """Return whether a flag is on the command line."""
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def as_typed(flag: str, value: object) -> str:
    """Return a flag and its value as they are typed."""
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else _name(value)}"


def _name(value: object) -> object:
    """Return the name of a member of an enumeration, as it is typed, and any other value itself."""
    return value.name if isinstance(value, Enum) else value


def given(flag: str, *values: object, off: object = None) -> Find:
    """Return a function that finds a flag.

    Args:
        flag: flag to find.
        values: values to find; all but 0, False and ``off`` unless given.
        off: value that means that the flag is not in use.
    """
    attribute = _attribute(flag)

    def find(checked: Any, argv: Sequence[str]) -> str | None:
        value = _name(getattr(checked, attribute, None))
        present = value in values if values else value and value != off
        return as_typed(flag, value) if present else None

    return find


def both(find: Find, *others: Find) -> Find:
    """Return a function that finds what ``find`` finds, where each of ``others`` finds something too."""

    def find_both(checked: Any, argv: Sequence[str]) -> str | None:
        found = find(checked, argv)
        return found if found is not None and all(other(checked, argv) is not None for other in others) else None

    return find_both


def without(find: Find, other: Find) -> Find:
    """Return a function that finds what ``find`` finds, where ``other`` finds nothing."""

    def find_alone(checked: Any, argv: Sequence[str]) -> str | None:
        return find(checked, argv) if other(checked, argv) is None else None

    return find_alone


def reads(function: Callable[[Any], str | None]) -> Find:
    """Return a finder of a function that reads the checked object alone."""
    return lambda checked, argv: function(checked)


def left_out(example: str, reason: str, instead: str = "", **more: Any) -> Combination:
    """Return the combination of one flag with the plugin: the flag must be left out."""
    must = "be left out with --wallfacer-cp-size"
    return Combination(example, given(example.split()[0]), must, reason, instead, **more)


def apart(flag: str, other: str, reason: str, *, needs: str = "", off: object = None, **more: Any) -> Combination:
    """Return the combination of two flags, of which one must be left out.

    Args:
        flag: first flag with its value, as typed; named in the error.
        other: second flag with its value.
        reason: clause after "because".
        needs: flags without which ``flag`` is an error already.
        off: value that means that the second flag is not in use.
        more: further attributes of the combination.
    """
    first, second = flag.split()[0], other.split()[0]
    find = both(given(first), given(second, off=off))
    return Combination(" ".join(filter(None, (flag, needs, other))), find, f"be left out with {second}", reason, **more)


def context_parallel_size(args: Any, argv: Sequence[str]) -> str | None:
    """Find a ``--context-parallel-size`` other than P."""
    size = args.context_parallel_size
    # A value that is neither the default nor P was given somehow, if not on the command line.
    if size == args.wallfacer_cp_size or (size == 1 and not is_typed(argv, "--context-parallel-size")):
        return None
    return as_typed("--context-parallel-size", size)


def ranks(args: Any, argv: Sequence[str]) -> str | None:
    """Find a number of ranks that tensor, pipeline and context parallel size do not divide."""
    world, size = int(os.environ.get("WORLD_SIZE", "1")), args.wallfacer_cp_size
    parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if world % (parallel * size) == 0:
        return None
    return f"--wallfacer-cp-size {size} on {world} ranks, tensor- times pipeline-parallel size {parallel}"


def sequence_length(args: Any, argv: Sequence[str]) -> str | None:
    """Find a sequence length that is no multiple of 2P."""
    for flag in ("--seq-length", "--encoder-seq-length"):
        length = getattr(args, _attribute(flag), None)
        if length is not None and length % (2 * args.wallfacer_cp_size):
            return as_typed(flag, length)
    return None


def cp_comm_type(args: Any, argv: Sequence[str]) -> str | None:
    """Find ``--cp-comm-type``, unless some layers keep Megatron's own attention: it applies to them."""
    kept = getattr(args, "wallfacer_layers", None) is not None
    return as_typed("--cp-comm-type", args.cp_comm_type) if not kept and is_typed(argv, "--cp-comm-type") else None


def typed(flag: str) -> Find:
    """Return a function that finds a flag on the command line, whatever its value."""
    return lambda args, argv: as_typed(flag, getattr(args, _attribute(flag), None)) if is_typed(argv, flag) else None


def attention_dropout(args: Any, argv: Sequence[str]) -> str | None:
    """Find attention dropout, of Megatron's arguments or of a layer."""
    found = given("--attention-dropout")(args, argv)
    by_default = found is not None and hasattr(args, "wallfacer_cp_size") and not is_typed(argv, "--attention-dropout")
    return f"{found} (Megatron's default)" if by_default else found


def window(args: Any, argv: Sequence[str]) -> str | None:
    """Find a window size that is no pair of numbers of tokens, of Megatron's arguments or of a layer."""
    size = getattr(args, "window_size", None)
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if size is None or (pair and all(isinstance(side, int) and side >= NO_LIMIT for side in size)):
        return None
    return f"--window-size {','.join(map(str, size)) if isinstance(size, (tuple, list)) else size}"


def packed_in_whole_sequence(args: Any, argv: Sequence[str]) -> str | None:
    """Find packed documents whose sequence is split as a whole."""
    return "--dataloader-inter-document-masking" if shards_whole_sequence(args) else None


def packed(args: Any, argv: Sequence[str]) -> str | None:
    """Find packed documents."""
    return given("--sft")(args, argv) or given("--dataloader-inter-document-masking")(args, argv)


def several_sequences(args: Any, argv: Sequence[str]) -> str | None:
    """Find a micro-batch of several sequences on several pipeline stages."""
    size = getattr(args, "micro_batch_size", None) or 1
    return as_typed("--micro-batch-size", size) if size > 1 and args.pipeline_model_parallel_size > 1 else None


def recomputed_attention(args: Any, argv: Sequence[str]) -> str | None:
    """Find flags with which Megatron recomputes attention."""
    # Megatron's validation turns --recompute-activations into the granularity and removes it.
    granularity = "selective" if getattr(args, "recompute_activations", False) else args.recompute_granularity
    modules = getattr(args, "recompute_modules", None) or ["core_attn"]
    recomputed = granularity == "full" or (granularity == "selective" and "core_attn" in modules)
    return f"--recompute-granularity {granularity}" if recomputed else None


def recomputed_mlp(args: Any, argv: Sequence[str]) -> str | None:
    """Find flags with which Megatron recomputes MLPs alone."""
    modules = getattr(args, "recompute_modules", None) or ()
    return "--recompute-modules mlp" if args.recompute_granularity == "selective" and "mlp" in modules else None


def offloading(args: Any, argv: Sequence[str]) -> str | None:
    """Find Megatron's own offloading of activations, by its flag or by its setting."""
    return given("--cpu-offloading-num-layers")(args, argv) or given("--cpu-offloading")(args, argv)
