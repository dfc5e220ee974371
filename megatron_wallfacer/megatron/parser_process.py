"""The process in which Megatron's parser is asked. Questions come as JSON on stdin, the answer goes as JSON to stdout.

A question is one command line: ``flags`` (each with its words), ``own`` (flags that the script adds to Megatron's),
``ranks``, ``device``. The answer to all:
``megatron``, its version, and for each ``problems`` (``text``, a flag first), ``grid`` or null, ``rules`` and
``kernel``: whether the plugin's rules, and the local kernel, were asked too. Or only ``error``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.kernels import Kernel, select_kernel
from megatron_wallfacer.kernels.select import KERNELS
from megatron_wallfacer.megatron.arguments import as_flag_error
from megatron_wallfacer.megatron.cpu_runtime import adapt_argv
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.megatron.version import Version, check_supported, megatron_version, version_text

#: One of these, and it is more than a part of a preset: the rules can say something.
_WHOLE = frozenset({"--num-attention-heads", "--seq-length", "--use-checkpoint-args"})
Problem = dict[str, str]


def main() -> None:
    """Answer, whatever Megatron prints on stdout at import."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with answer:
        json.dump(_answer(json.load(sys.stdin)), answer)


def _answer(questions: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        version = megatron_version()
        check_supported(version)
        verdicts = [_verdict(question, _session(version, torch.device(question["device"]))) for question in questions]
    except WallfacerError as error:
        return {"error": str(error)}
    return {"megatron": version_text(version), "verdicts": verdicts}


def _session(version: Version, device: torch.device) -> Session:
    is_here = device.type == "cpu" or torch.cuda.is_available()
    return Session(version, device) if is_here else _SessionElsewhere(version, device)


class _SessionElsewhere(Session):
    """On a machine without the device: which kernel serves is known where it runs. A wrong name is wrong here too."""

    def kernel(self, dtype: torch.dtype, head_dim: int, v_head_dim: int | None = None) -> Kernel:
        assert self.settings is not None
        name = "reference" if self.settings.kernel in KERNELS else self.settings.kernel
        try:
            return select_kernel(name, device=self.device, dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim)
        except OptionError as error:
            raise as_flag_error(error) from error


def _verdict(question: dict[str, Any], session: Session) -> dict[str, Any]:
    """Flags that do not exist are all named; else what the parser finds first; else the first rule that is broken."""
    hooks = Hooks(session)
    hooks.install()
    try:
        parser = pkgutil.resolve_name(hooks.always[0].target)(_Parser(allow_abbrev=False))
        flags = [flag for flag, *_ in question["flags"]]
        rules = not _WHOLE.isdisjoint(flags)
        problems = list(_unknown({*parser._option_string_actions, *question["own"]}, flags))
        if not problems:
            try:
                _parse(parser, question, rules)
            except (_Mistake, WallfacerError) as error:
                problems = [{"text": str(error)}]
    finally:
        hooks.uninstall()
    plan = session.settings.plan if session.settings and not problems else None
    return {
        "problems": problems,
        "grid": f"{plan.scheme}: {plan.grid}" if plan else None,
        "rules": rules,
        "kernel": rules and not isinstance(session, _SessionElsewhere),
    }


def _unknown(known: set[str], flags: list[str]) -> Iterator[Problem]:
    for flag in flags:
        if flag not in known:
            near = difflib.get_close_matches(flag, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield {"text": f"{flag}: this Megatron has no such flag{hint}"}


def _parse(parser: argparse.ArgumentParser, question: dict[str, Any], rules: bool) -> None:
    """First the parser alone, then as in a run: the plugin's rules follow its parsing."""
    # What words a script's own flag takes is known to the script alone.
    known = parser._option_string_actions
    flags = [words for words in question["flags"] if words[0] in known]
    argv = [word for words in flags for word in words]
    if question["device"] == "cpu":
        argv, _ = adapt_argv(argv)
    if _left_over(parser, argv):
        # Whose words they are shows when each flag is parsed by itself.
        strays = ((words[0], _left_over(parser, words)) for words in flags)
        raise next(_Mistake(f"{flag}: takes no value {stray[0]}") for flag, stray in strays if stray)
    if rules:
        os.environ["WORLD_SIZE"] = str(question["ranks"])
        sys.argv = ["pretrain_gpt.py", *argv]
        parser.parse_known_args(argv)


def _left_over(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Words that belong to no flag. The hook wraps the method of this one parser; the class still has Megatron's."""
    return argparse.ArgumentParser.parse_known_args(parser, argv)[1]


class _Mistake(Exception):
    """What the parser says of a flag's words."""


class _Parser(argparse.ArgumentParser):
    """Raises where the original prints Megatron's whole usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise _Mistake(message.removeprefix("argument "))


if __name__ == "__main__":
    main()
