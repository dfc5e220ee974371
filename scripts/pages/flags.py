"""The rows of the table of flags, one for each field of :class:`megatron_wallfacer.megatron.flags.Flags`."""

from __future__ import annotations

from megatron_wallfacer.megatron.flag_group import FlagSpec
from megatron_wallfacer.megatron.flags import FLAGS
from megatron_wallfacer.megatron.releases import version_text


def flag_rows() -> str:
    """Return the rows in Markdown."""
    return "\n".join(
        f"| `{_usage(spec)}` | {_default(spec)} | {_effect(spec)} | {version_text(spec.since)} |" for spec in FLAGS
    )


def _usage(spec: FlagSpec) -> str:
    return spec.name if spec.convert is None else f"{spec.name} {spec.argparse_meta['metavar']}"


def _default(spec: FlagSpec) -> str:
    if spec.convert is None:
        return "off"
    return spec.unset or f"`{spec.default}`"


def _effect(spec: FlagSpec) -> str:
    sentences = [spec.summary, spec.details]
    if spec.values:
        sentences.insert(1, f"Values: {', '.join(f'`{value}`' for value in spec.values)}.")
    if spec.see:
        page = spec.see.partition(".")[0]
        sentences.append(f"See [{page}]({spec.see}).")
    return " ".join(filter(None, sentences)).replace("``", "`")
