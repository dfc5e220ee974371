"""Run Megatron's parser in a process of its own, with requests as JSON on stdin and results as JSON on stdout.

A request is one command line: ``flags`` (each with its values), ``script_flags`` (flags that the script adds to
Megatron's), ``ranks`` and ``device``. In the output, ``megatron`` is Megatron's version, and ``results`` has one entry
per request. In an entry, ``problems`` is a list of errors, each with a ``text`` that begins with a flag. ``grid`` is
the chosen grid as text, or null. ``rules`` is true if the plugin checked the flags, and ``kernel`` is true if the
plugin also checked the attention kernel. If Megatron cannot be used, the output has only ``error``.
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

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels import Kernel, select_kernel
from megatron_wallfacer.kernels.select import KERNELS
from megatron_wallfacer.megatron.cpu_runtime import adapt_argv
from megatron_wallfacer.megatron.cpu_runtime.environment import leave_uncompiled
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import version_text
from megatron_wallfacer.megatron.version import Version, check_supported, megatron_version

#: Flags of a model. A preset without any of them describes only a part of a run, so the plugin's rules do not apply.
_MODEL_FLAGS = frozenset({"--num-attention-heads", "--seq-length", "--use-checkpoint-args"})
Problem = dict[str, str]


def main() -> None:
    """Check all requests. Text that Megatron prints during its import goes to stderr."""
    leave_uncompiled()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with output:
        json.dump(_check_all(json.load(sys.stdin)), output)


def _check_all(requests: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        version = megatron_version()
        check_supported(version)
        results = [_check(request, version) for request in requests]
    except WallfacerError as error:
        return {"error": str(error)}
    return {"megatron": version_text(version), "results": results}


class _StateWithoutDevice(PluginState):
    """State of the plugin on a node without the requested device. The check accepts every kernel of the plugin."""

    def kernel(self, dtype: torch.dtype, head_dim: int, v_head_dim: int | None = None) -> Kernel:
        if self.settings.flags.kernel not in KERNELS:
            return super().kernel(dtype, head_dim, v_head_dim)  # raises
        return select_kernel("reference", device=self.device, dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim)


def _check(request: dict[str, Any], version: Version) -> dict[str, Any]:
    """Return the problems of a command line: all unknown flags, else the first error of the parser or the plugin."""
    device = torch.device(request["device"])
    has_device = device.type == "cpu" or torch.cuda.is_available()
    state = (PluginState if has_device else _StateWithoutDevice)(version, device)
    hooks = Hooks(state)
    hooks.install()
    try:
        parser = pkgutil.resolve_name(hooks.every[0].target)(_Parser(allow_abbrev=False))
        flags = [flag for flag, *_ in request["flags"]]
        rules = not _MODEL_FLAGS.isdisjoint(flags)
        problems = list(_unknown({*parser._option_string_actions, *request["script_flags"]}, flags))
        if not problems:
            try:
                _parse(parser, request, rules)
            except (_ParserError, WallfacerError) as error:
                problems = [{"text": str(error)}]
    finally:
        hooks.uninstall()
    plan = state.settings.plan if state.is_on and not problems else None
    return {
        "problems": problems,
        "grid": f"{plan.scheme}: {plan.grid}" if plan else None,
        "rules": rules,
        "kernel": rules and has_device,
    }


def _unknown(known: set[str], flags: list[str]) -> Iterator[Problem]:
    for flag in flags:
        if flag not in known:
            similar = difflib.get_close_matches(flag, sorted(known), n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            yield {"text": f"{flag}: this Megatron has no such flag{hint}"}


def _parse(parser: argparse.ArgumentParser, request: dict[str, Any], rules: bool) -> None:
    """Run Megatron's parser, first without and then with the checks of the plugin."""
    # Leave out the script's own flags, because only the script defines how many values they have.
    known = parser._option_string_actions
    flags = [arguments for arguments in request["flags"] if arguments[0] in known]
    argv = [argument for arguments in flags for argument in arguments]
    if request["device"] == "cpu":
        argv, _ = adapt_argv(argv)
    if _left_over(parser, argv):
        # Parsing each flag alone shows the flag of the extra value.
        extra = ((arguments[0], _left_over(parser, arguments)) for arguments in flags)
        raise next(_ParserError(f"{flag}: takes no value {values[0]}") for flag, values in extra if values)
    if rules:
        os.environ["WORLD_SIZE"] = str(request["ranks"])
        sys.argv = ["pretrain_gpt.py", *argv]
        parser.parse_known_args(argv)


def _left_over(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Return the arguments that belong to no flag."""
    # The hook has replaced the method of the instance, not the method of the class.
    return argparse.ArgumentParser.parse_known_args(parser, argv)[1]


class _ParserError(Exception):
    """Error of Megatron's parser."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises an exception. The base class would print Megatron's complete usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise _ParserError(message.removeprefix("argument "))


if __name__ == "__main__":
    main()
