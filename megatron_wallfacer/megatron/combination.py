"""Describe a combination of arguments that the plugin does not support, with its check and its error message."""

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

#: Function of the checked object and of the words on the command line. It returns the flag and its value as typed if
#: the combination is present, else None. It ignores an attribute that the Megatron release does not have.
Find = Callable[[Any, Sequence[str]], str | None]
#: "parse" checks Megatron's parsed arguments before the first step. "model" checks the TransformerConfig when a layer
#: is built. "call" checks the PackedSeqParams of a call, or the TransformerConfig if the call has none.
When = Literal["parse", "model", "call"]

#: Attributes of flags that are not named after their attribute.
_ATTRIBUTES = {"--fp8-format": "fp8", "--fp4-format": "fp4"}


@dataclass(frozen=True)
class Combination:
    """One unsupported combination: a check, a row of docs/unsupported.md and a test case.

    Attributes:
        example: flags, as typed, that are not supported together with ``--wallfacer-cp-size 8`` on eight ranks. The
            error names the first flag of the example. Without a flag the example is ``attribute=value``.
        find: function that finds the combination.
        must: words that follow "must" in the error message. P replaces ``{cp_size}``.
        reason: clause after "because".
        instead: advice such as ``use --attention-dropout 0``, or empty.
        when: moments of the check: after parsing, when a layer is built, or in a call of attention.
        distributed_only: whether the combination is an error only if P > 1.
        before: first Megatron release with which the plugin supports the combination, or None if there is no such
            release.
        also: further flags with the same error, which are tested but get no row in docs/unsupported.md.
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
        """Return the part of the error message that names the allowed values."""
        release = "" if self.before is None else f" before Megatron {version_text(self.before)}"
        return self.must.replace("{cp_size}", str(cp_size)) + release

    def message(self, named: str, cp_size: int) -> str:
        """Return the error message. ``named`` is its first part, the flag and its value as typed."""
        instead = f" ({self.instead})" if self.instead else ""
        return f"{named}: must {self.allowed(cp_size)}, because {self.reason}{instead}"


def _attribute(flag: str) -> str:
    return _ATTRIBUTES.get(flag, attribute_of(flag))


def is_typed(argv: Sequence[str], flag: str) -> bool:
    """Return whether a flag is on the command line, with or without ``=value``."""
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def as_typed(flag: str, value: object) -> str:
    """Return a flag and its value in the form of the command line."""
    if value is True:
        return flag
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else _name(value)}"


def _name(value: object) -> object:
    """Return an enumeration member's name, as typed on the command line, or any other value unchanged."""
    return value.name if isinstance(value, Enum) else value


def given(flag: str, *values: object, off: object = None) -> Find:
    """Return a function that looks for a flag with one of the given values.

    Args:
        flag: flag to look up.
        values: values to look for; by default all values except ``off``, None, False, 0 and empty text.
        off: without ``values``, another value to ignore, such as the default of the flag.
    """
    attribute = _attribute(flag)

    def find(checked: Any, argv: Sequence[str]) -> str | None:
        value = _name(getattr(checked, attribute, None))
        present = value in values if values else value and value != off
        return as_typed(flag, value) if present else None

    return find


def both(find: Find, *others: Find) -> Find:
    """Return a function that returns the result of ``find`` if each of ``others`` also finds something, else None."""

    def find_both(checked: Any, argv: Sequence[str]) -> str | None:
        found = find(checked, argv)
        return None if found is None or any(other(checked, argv) is None for other in others) else found

    return find_both


def without(find: Find, other: Find) -> Find:
    """Return a function that returns None if ``other`` finds something, else the result of ``find``."""

    def find_alone(checked: Any, argv: Sequence[str]) -> str | None:
        found = find(checked, argv)
        return None if found is None or other(checked, argv) is not None else found

    return find_alone


def reads(function: Callable[[Any], str | None]) -> Find:
    """Convert a function of Megatron's arguments, or of a layer's configuration, to a :data:`Find`."""
    return lambda checked, argv: function(checked)


def left_out(example: str, reason: str, instead: str = "", **more: Any) -> Combination:
    """Return the :class:`Combination` for a flag that must be left out if the plugin is on."""
    must = "be left out with --wallfacer-cp-size"
    return Combination(example, given(example.split()[0]), must, reason, instead, **more)


def apart(flag: str, other: str, reason: str, *, needs: str = "", off: object = None, **more: Any) -> Combination:
    """Return the :class:`Combination` of two flags that exclude each other.

    Args:
        flag: first flag and its value. The error message names this flag.
        other: second flag and its value.
        reason: clause after "because".
        needs: flags, as typed, that ``flag`` requires.
        off: value of the second flag with which both flags work together, such as its default.
        more: further fields of the returned :class:`Combination`.
    """
    first, second = flag.split()[0], other.split()[0]
    find = both(given(first), given(second, off=off))
    return Combination(" ".join(filter(None, (flag, needs, other))), find, f"be left out with {second}", reason, **more)


def context_parallel_size(args: Any, argv: Sequence[str]) -> str | None:
    """Return ``--context-parallel-size N`` if N differs from P, else None. A default of 1 gives None too."""
    size = args.context_parallel_size
    # A script may set the value in code, so a value other than 1 and P is an error even if it was not typed.
    if size == args.wallfacer_cp_size or (size == 1 and not is_typed(argv, "--context-parallel-size")):
        return None
    return as_typed("--context-parallel-size", size)


def ranks(args: Any, argv: Sequence[str]) -> str | None:
    """Return text about the world size if it is not a multiple of tensor-parallel x pipeline-parallel size x P."""
    world, size = int(os.environ.get("WORLD_SIZE", "1")), args.wallfacer_cp_size
    parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if world % (parallel * size) == 0:
        return None
    return f"--wallfacer-cp-size {size} on {world} ranks, tensor- times pipeline-parallel size {parallel}"


def sequence_length(args: Any, argv: Sequence[str]) -> str | None:
    """Return the flag with the sequence length if the length is not a multiple of 2P, else None."""
    for flag in ("--seq-length", "--encoder-seq-length"):
        length = getattr(args, _attribute(flag), None)
        if length is not None and length % (2 * args.wallfacer_cp_size):
            return as_typed(flag, length)
    return None


def cp_comm_type(args: Any, argv: Sequence[str]) -> str | None:
    """Find ``--cp-comm-type`` on the command line. The flag is allowed if some layers keep Megatron's own attention."""
    kept = getattr(args, "wallfacer_layers", None) is not None
    return as_typed("--cp-comm-type", args.cp_comm_type) if not kept and is_typed(argv, "--cp-comm-type") else None


def typed(flag: str) -> Find:
    """Return a function that finds a flag on the command line, whatever its value."""
    return lambda args, argv: as_typed(flag, getattr(args, _attribute(flag), None)) if is_typed(argv, flag) else None


def attention_dropout(args: Any, argv: Sequence[str]) -> str | None:
    """Find attention dropout in Megatron's arguments or in a layer's configuration."""
    found = given("--attention-dropout")(args, argv)
    by_default = found is not None and hasattr(args, "wallfacer_cp_size") and not is_typed(argv, "--attention-dropout")
    return f"{found} (Megatron's default)" if by_default else found


def window(args: Any, argv: Sequence[str]) -> str | None:
    """Find a ``--window-size`` that is not a pair of token counts."""
    size = getattr(args, "window_size", None)
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if size is None or (pair and all(isinstance(side, int) and side >= NO_LIMIT for side in size)):
        return None
    return f"--window-size {','.join(map(str, size)) if isinstance(size, (tuple, list)) else size}"


def packed_in_whole_sequence(args: Any, argv: Sequence[str]) -> str | None:
    """Find packed documents in a sequence that ranks split without regard to document boundaries."""
    return "--dataloader-inter-document-masking" if shards_whole_sequence(args) else None


def packed(args: Any, argv: Sequence[str]) -> str | None:
    """Find flags that pack documents into one sequence."""
    return given("--sft")(args, argv) or given("--dataloader-inter-document-masking")(args, argv)


def several_sequences(args: Any, argv: Sequence[str]) -> str | None:
    """Return ``--micro-batch-size N`` if N > 1 and the job has several pipeline stages, else None."""
    size = getattr(args, "micro_batch_size", None) or 1
    return as_typed("--micro-batch-size", size) if size > 1 and args.pipeline_model_parallel_size > 1 else None


def recomputed_attention(args: Any, argv: Sequence[str]) -> str | None:
    """Find flags that make Megatron recompute attention."""
    # Megatron's validation turns --recompute-activations into the granularity and removes it.
    granularity = "selective" if getattr(args, "recompute_activations", False) else args.recompute_granularity
    modules = getattr(args, "recompute_modules", None) or ["core_attn"]
    recomputed = granularity == "full" or (granularity == "selective" and "core_attn" in modules)
    return f"--recompute-granularity {granularity}" if recomputed else None


def recomputed_mlp(args: Any, argv: Sequence[str]) -> str | None:
    """Find flags that make Megatron recompute MLPs but not the whole layer."""
    modules = getattr(args, "recompute_modules", None) or ()
    return "--recompute-modules mlp" if args.recompute_granularity == "selective" and "mlp" in modules else None


def offloading(args: Any, argv: Sequence[str]) -> str | None:
    """Return the flag or the attribute that switches on Megatron's own offloading of activations, else None."""
    return given("--cpu-offloading-num-layers")(args, argv) or given("--cpu-offloading")(args, argv)
