"""One dataclass gives the parser, ``--help`` and the values of the flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flag_group import add_flags, field_docstrings, flag_specs
from megatron_wallfacer.megatron.flags import FLAGS, Flags, add_arguments
from megatron_wallfacer.megatron.releases import RELEASES


@dataclass(frozen=True)
class Toys:
    """A group of two flags."""

    colour: str = field(default="red", metadata={"since": (0, 17), "argparse_meta": {"metavar": "NAME"}})
    """Colour of the ``toy``.

    Details are for the table.
    """
    wheels: int | None = field(default=None, metadata={"since": (0, 18), "unset": "4, or 100 % more"})
    """Number of wheels."""
    loud: bool = field(default=False, metadata={"since": (0, 18)})
    """Make noise."""


def parser_of(specs: tuple) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, specs, "toys", "all toys")
    return parser


def test_a_dataclass_is_a_group_of_flags() -> None:
    parser = parser_of(flag_specs(Toys, "--toy-"))
    text = " ".join(parser.format_help().split())
    assert "--toy-colour NAME Colour of the toy (default: red)" in text
    assert "Number of wheels (default: 4, or 100 % more)" in text
    assert "--toy-loud Make noise (default: off)" in text
    args = parser.parse_args("--toy-wheels 3 --toy-loud".split())
    assert (args.toy_colour, args.toy_wheels, args.toy_loud) == ("red", 3, True)


def test_a_wrong_value_is_an_error_of_one_line() -> None:
    with pytest.raises(WallfacerError, match=r"^--toy-wheels three: must be a whole number$"):
        parser_of(flag_specs(Toys, "--toy-")).parse_args(["--toy-wheels", "three"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--wallfacer-loss-tiles=0", "must be a positive whole number of tiles, or auto"),
        ("--wallfacer-mlp-tiles=many", "must be a positive whole number of tiles, or auto"),
        ("--wallfacer-keep-on-host=1.1", "must be auto, or a fraction of the layers, above 0 and at most 1"),
        ("--wallfacer-layer-inputs-on-host=half", "must be auto, or a fraction of the layers, above 0 and at most 1"),
        ("--wallfacer-verify-every=-1", "must be a positive number of steps"),
    ],
)
def test_each_kind_of_number_is_checked(argument: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(WallfacerError, match=f"^{argument.replace('=', ' ')}: {message}$"):
        parser.parse_args([argument])


def test_arguments_without_our_flags_are_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert Flags.of(parser.parse_args([])) == Flags.of(argparse.Namespace()) == Flags()
    assert not Flags().is_on()


@pytest.mark.parametrize(
    ("flags", "typed"),
    [(Flags(bidirectional=True), "--wallfacer-bidirectional"), (Flags(team_size=2), "--wallfacer-team-size 2")],
)
def test_every_flag_needs_the_flag_that_turns_the_plugin_on(flags: Flags, typed: str) -> None:
    with pytest.raises(WallfacerError, match=f"^{typed}: needs --wallfacer-cp-size P$"):
        flags.is_on()


def test_every_flag_is_documented() -> None:
    assert field_docstrings(Flags).keys() == {one.name for one in fields(Flags)}
    for spec in FLAGS:
        assert spec.summary.endswith("."), spec.name
        assert spec.default is not None or spec.unset, spec.name
        assert spec.since in {release.number for release in RELEASES}, spec.name
