"""One YAML file of a preset, read strictly: whatever is not understood is one line with file and line number.

Words are taken as they are written: ``1e-5`` is three characters for Megatron's parser to read, not a number of YAML's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.input_files import compose_yaml
from megatron_wallfacer.presets.entry import Origin, Setting
from megatron_wallfacer.presets.torchrun import FLAGS, check_torchrun

ENVIRONMENT, TORCHRUN, MODEL, EXTENDS = "ENV_VARS", "TORCHRUN_ARGS", "MODEL_ARGS", "extends"
SECTIONS = (ENVIRONMENT, TORCHRUN, MODEL)

_FLAG = re.compile(r"--[A-Za-z0-9][A-Za-z0-9_-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_YAML = "tag:yaml.org,2002:"
_TEXT = {_YAML + kind for kind in ("str", "int", "float", "timestamp")}


@dataclass(frozen=True)
class Source:
    """What one file says.

    Attributes:
        extends: the files below it, the last one on top, each with the place that names it.
        sections: settings by section and name, in the order of the file.
    """

    extends: tuple[tuple[Path, Origin], ...]
    sections: dict[str, dict[str, Setting]]


def read_source(path: Path) -> Source:
    """Read one file; what it extends is named, not read.

    Raises:
        WallfacerError: it cannot be read, is not YAML, or says something that is not understood.
    """
    file = _File(path)
    extends: tuple[tuple[Path, Origin], ...] = ()
    sections: dict[str, dict[str, Setting]] = {name: {} for name in SECTIONS}
    readers = {ENVIRONMENT: file.variable, TORCHRUN: file.torchrun_flag, MODEL: file.flag}
    for key, node in file.entries(file.root(), "the file"):
        name = key.value
        if name == EXTENDS:
            extends = tuple(file.extended(node))
        elif name in readers:
            sections[name] = dict(file.settings(name, node, readers[name]))
        else:
            file.refuse(key, f"{name}: is not a key that exists; there are {', '.join((EXTENDS, *SECTIONS))}")
    return Source(extends, sections)


class _File:
    """The nodes of one file. A node knows its line, which what PyYAML makes of it does not."""

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, os.path.normpath(path)

    def root(self) -> yaml.Node:
        root = compose_yaml(self._path)
        if root is None:
            raise WallfacerError(f"{Origin(self._name, 1)}: says nothing; write {EXTENDS} or {', '.join(SECTIONS)}")
        return root

    def refuse(self, node: yaml.Node, text: str) -> NoReturn:
        raise WallfacerError(f"{self.origin(node)}: {text}")

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self._name, node.start_mark.line + 1)

    def entries(self, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Keys and values of a mapping; a key that stands twice is a mistake, where PyYAML takes the last."""
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, f"{what}: must be a mapping of names to values")
        seen: dict[str, Origin] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(key, f"{what}: a key must be a name")
            if key.value in seen:
                self.refuse(key, f"{key.value}: stands twice, first in line {seen[key.value].line}")
            seen[key.value] = self.origin(key)
            yield key, value

    def extended(self, node: yaml.Node) -> Iterator[tuple[Path, Origin]]:
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(node, f"{EXTENDS}: must be a list of files")
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode) or item.tag != _YAML + "str" or not item.value:
                self.refuse(item, f"{EXTENDS}: must be a list of files")
            target = Path(os.path.normpath(self._path.parent / item.value))
            if not target.is_file():
                self.refuse(item, f"{EXTENDS} {item.value}: there is no file {target}")
            yield target, self.origin(item)

    def settings(
        self, section: str, node: yaml.Node, read: Callable[[yaml.ScalarNode, yaml.Node], Setting]
    ) -> Iterator[tuple[str, Setting]]:
        for key, value in self.entries(node, section):
            yield key.value, read(key, value)

    def variable(self, key: yaml.ScalarNode, node: yaml.Node) -> Setting:
        if not _VARIABLE.fullmatch(key.value):
            self.refuse(key, f"{key.value}: is no name of a variable")
        if not self._is_text(node):
            self.refuse(node, f"{key.value}: must be one word or number; true, false and nothing need quotes")
        return Setting(key.value, (node.value,), self.origin(key))

    def torchrun_flag(self, key: yaml.ScalarNode, node: yaml.Node) -> Setting:
        if not self._is_text(node):
            self.refuse(node, f"{key.value}: must be one word or number")
        setting = Setting(key.value, (node.value,), self.origin(key))
        check_torchrun(setting)
        return setting

    def flag(self, key: yaml.ScalarNode, node: yaml.Node) -> Setting:
        if not _FLAG.fullmatch(key.value):
            self.refuse(key, f"{key.value}: must be a flag as it is typed, like --num-layers")
        if key.value in FLAGS:
            self.refuse(key, f"{key.value}: is torchrun's, so it belongs under {TORCHRUN}")
        return Setting(key.value, self._words(key.value, node), self.origin(key))

    def _words(self, name: str, node: yaml.Node) -> tuple[str, ...] | None:
        if isinstance(node, yaml.SequenceNode):
            if not node.value or not all(map(self._is_text, node.value)):
                self.refuse(node, f"{name}: a list must hold words or numbers")
            return tuple(item.value for item in node.value)
        if self._is_text(node):
            return (node.value,)
        if node.tag == _YAML + "bool" and node.value.lower() in ("true", "false"):
            return () if node.value.lower() == "true" else None
        written = f"{node.value}: " if isinstance(node, yaml.ScalarNode) and node.value else ""
        self.refuse(node, f"{name}: {written}must be a word, a number, a list of them, or true or false for a switch")

    @staticmethod
    def _is_text(node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and node.tag in _TEXT
