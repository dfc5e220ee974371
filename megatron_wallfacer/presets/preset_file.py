"""Read one YAML file of a preset. Unknown sections and repeated keys are errors. A message has file and line number.

Values remain text, because Megatron's parser needs the four characters ``1e-5``, not the number that YAML reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.input_files import compose_yaml
from megatron_wallfacer.presets.entry import Location, PresetEntry
from megatron_wallfacer.presets.torchrun import FLAGS, check_torchrun

ENVIRONMENT, TORCHRUN, MODEL, EXTENDS = "ENV_VARS", "TORCHRUN_ARGS", "MODEL_ARGS", "extends"
SECTIONS = (ENVIRONMENT, TORCHRUN, MODEL)
#: Statements about a preset for readers: machines that ran it, measurements, and limitations.
STATEMENTS = ("validated_on", "measured", "known_limitations")

_FLAG = re.compile(r"--[A-Za-z0-9][A-Za-z0-9_-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_YAML = "tag:yaml.org,2002:"
_TEXT = {_YAML + kind for kind in ("str", "int", "float", "timestamp")}


@dataclass(frozen=True)
class PresetFile:
    """Content of one preset file.

    Attributes:
        extends: each file that this file extends, with the line that names it. Later files in the
            list override earlier files.
        sections: entries by section and name, in the order of the file.
        statements: remarks on tests, measurements and limits of the preset. A key is one of :data:`STATEMENTS`.
    """

    extends: tuple[tuple[Path, Location], ...]
    sections: dict[str, dict[str, PresetEntry]]
    statements: dict[str, tuple[str, ...]]


def read_preset_file(path: Path) -> PresetFile:
    """Read one file without the files that it extends.

    Raises:
        WallfacerError: The file cannot be read, is not YAML, or has an invalid entry.
    """
    reader = _Reader(path)
    extends: tuple[tuple[Path, Location], ...] = ()
    sections: dict[str, dict[str, PresetEntry]] = {name: {} for name in SECTIONS}
    statements: dict[str, tuple[str, ...]] = {}
    readers = {ENVIRONMENT: reader.variable, TORCHRUN: reader.torchrun_flag, MODEL: reader.flag}
    for section, node in reader.items(reader.root(), "the file"):
        name = section.value
        if name == EXTENDS:
            extends = tuple(reader.extended_files(node))
        elif name in readers:
            sections[name] = {key.value: readers[name](key, value) for key, value in reader.items(node, name)}
        elif name in STATEMENTS:
            statements[name] = reader.statement(name, node)
        else:
            reader.fail(section, f"{name}: must be one of {', '.join((EXTENDS, *SECTIONS, *STATEMENTS))}")
    return PresetFile(extends, sections, statements)


class _Reader:
    """Reader of the YAML nodes of one file. PyYAML's nodes have line numbers, but PyYAML's values do not."""

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, os.path.normpath(path)

    def root(self) -> yaml.Node:
        root = compose_yaml(self._path)
        if root is None:
            raise WallfacerError(
                f"{Location(self._name, 1)}: is empty; must contain {EXTENDS} or {', '.join(SECTIONS)}"
            )
        return root

    def fail(self, node: yaml.Node, text: str) -> NoReturn:
        raise WallfacerError(f"{self.location(node)}: {text}")

    def location(self, node: yaml.Node) -> Location:
        return Location(self._name, node.start_mark.line + 1)

    def items(self, node: yaml.Node, name: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Yield the keys and values of a mapping. A repeated key is an error, unlike in PyYAML."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{name}: must be a mapping of names to values")
        seen: dict[str, Location] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, f"{name}: a key is a list or a mapping; must be a word or number")
            if key.value in seen:
                self.fail(key, f"{key.value}: must occur only once, is already in line {seen[key.value].line}")
            seen[key.value] = self.location(key)
            yield key, value

    def extended_files(self, node: yaml.Node) -> Iterator[tuple[Path, Location]]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{EXTENDS}: must be a list of files")
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode) or item.tag != _YAML + "str" or not item.value:
                self.fail(item, f"{EXTENDS}: must be a list of files")
            target = Path(os.path.normpath(self._path.parent / item.value))
            if not target.is_file():
                self.fail(item, f"{EXTENDS} {item.value}: must be a file; {target} does not exist")
            yield target, self.location(item)

    def statement(self, name: str, node: yaml.Node) -> tuple[str, ...]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not items or not all(self._is_text(item) and item.value for item in items):
            self.fail(node, f"{name}: must be a text or a list of texts")
        return tuple(" ".join(item.value.split()) for item in items)

    def variable(self, key: yaml.ScalarNode, node: yaml.Node) -> PresetEntry:
        if not _VARIABLE.fullmatch(key.value):
            self.fail(key, f"{key.value}: must be the name of an environment variable")
        if not self._is_text(node):
            self.fail(node, f"{key.value}: must be one word or number; true, false and empty values need quotes")
        return PresetEntry(key.value, (node.value,), self.location(key))

    def torchrun_flag(self, key: yaml.ScalarNode, node: yaml.Node) -> PresetEntry:
        if not self._is_text(node):
            self.fail(node, f"{key.value}: must be one word or number")
        entry = PresetEntry(key.value, (node.value,), self.location(key))
        check_torchrun(entry)
        return entry

    def flag(self, key: yaml.ScalarNode, node: yaml.Node) -> PresetEntry:
        if not _FLAG.fullmatch(key.value):
            self.fail(key, f"{key.value}: must be a flag with its dashes, such as --num-layers")
        if key.value in FLAGS:
            self.fail(key, f"{key.value}: is a flag of torchrun and must be under {TORCHRUN}")
        return PresetEntry(key.value, self._values(key.value, node), self.location(key))

    def _values(self, name: str, node: yaml.Node) -> tuple[str, ...] | None:
        if isinstance(node, yaml.SequenceNode):
            if not node.value or not all(map(self._is_text, node.value)):
                self.fail(node, f"{name}: a list must hold words or numbers")
            return tuple(item.value for item in node.value)
        if self._is_text(node):
            return (node.value,)
        if node.tag == _YAML + "bool" and node.value.lower() in ("true", "false"):
            return () if node.value.lower() == "true" else None
        written = f"{node.value}: " if isinstance(node, yaml.ScalarNode) and node.value else ""
        self.fail(node, f"{name}: {written}must be a word, a number, a list of them, or true or false for a switch")

    @staticmethod
    def _is_text(node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and node.tag in _TEXT
