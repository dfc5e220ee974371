"""List Megatron-LM releases and the first release with which each feature works.

This module imports neither the package nor Megatron nor PyTorch, because ``setup.py`` executes this file.
"""

from __future__ import annotations

from typing import NamedTuple

Number = tuple[int, int]


class Release(NamedTuple):
    """A Megatron-LM release.

    Attributes:
        number: release as (major, minor).
        tested: version of the release that ``python -m scripts.versions`` tests.
        wheel: whether PyPI has the version. If not, tests use a checkout of Megatron's main branch.
        launcher: whether ``python -m megatron_wallfacer`` supports the release. It needs Megatron's training loop,
            which older wheels lack.
    """

    number: Number
    tested: str
    wheel: bool = True
    launcher: bool = True


RELEASES = (
    Release((0, 13), "0.13.1", launcher=False),
    Release((0, 14), "0.14.0", launcher=False),
    Release((0, 15), "0.15.3", launcher=False),
    Release((0, 16), "0.16.1", launcher=False),
    Release((0, 17), "0.17.1"),
    Release((0, 18), "0.18.2"),
    Release((0, 19), "0.19.2"),
    Release((0, 20), "0.20.0", wheel=False),
)

#: First release that the hooks support, and first release that is too new for the hooks.
FIRST_HOOKED: Number = RELEASES[0].number
UNTIL: Number = (RELEASES[-1].number[0], RELEASES[-1].number[1] + 1)
#: First release that the launcher runs.
FIRST_LAUNCHED: Number = next(one.number for one in RELEASES if one.launcher)

#: First release in which ``--vocab-size`` of the ``NullTokenizer`` counts the end-of-document token.
VOCABULARY_WITH_END: Number = (0, 18)
#: First release whose model takes an ``output_processor``, which ``--wallfacer-loss-tiles`` needs.
OUTPUT_PROCESSOR: Number = (0, 18)
#: First release whose wheel is enough for ``scripts/pretrain_gpt.py``.
MODEL_BUILDER: Number = (0, 19)
#: First release whose ``--cuda-graph-impl local`` keeps what backward reads.
LOCAL_GRAPHS: Number = (0, 19)
#: First release whose function for rotary positions has an argument for the layout of packed documents.
ROTARY_LAYOUT: Number = (0, 19)


def version_text(number: tuple[int, ...]) -> str:
    """Return a release or version as text, such as ``0.19`` or ``0.19.2``."""
    return ".".join(map(str, number))


#: Releases that the launcher supports, for messages.
SUPPORTED = f"megatron-core {version_text(FIRST_LAUNCHED)} to {version_text(RELEASES[-1].number)}"
_WITHOUT_WHEEL = next(one.number for one in RELEASES if not one.wheel)
#: Requirement for pip.
REQUIREMENT = f"megatron-core[training]>={version_text(FIRST_LAUNCHED)},<{version_text(_WITHOUT_WHEEL)}"
