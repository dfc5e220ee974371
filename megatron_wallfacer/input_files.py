"""Read text, YAML and JSON files of limited size. Each error is one line with the file and the line number.

Every file is safe to open. A device such as ``/dev/zero``, a file of 1 GiB, text that is not UTF-8, unlimited nesting
or a repeated key raises an error within 2 s, with at most 500 MB of memory.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    import yaml

#: Largest number of bytes of a YAML file: PyYAML reads about 100 kB per second.
YAML_BYTES = 64 << 10
#: Largest depth of nested mappings and lists in a YAML file.
DEPTH = 16
#: Largest numbers of bytes, containers (objects and lists) and values of a JSON file, so that it fits in 500 MB.
JSON_BYTES, JSON_CONTAINERS, JSON_VALUES = 32 << 20, 250_000, 1_500_000


def read_text(path: Path, limit: int) -> str:
    """Return the text of a regular file of at most ``limit`` bytes.

    Raises:
        WallfacerError: The file is no regular file, is too large, or is not UTF-8.
    """
    name = os.path.normpath(path)
    try:
        # Opening a pipe without O_NONBLOCK would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise WallfacerError(f"{name}: must be a regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise WallfacerError(f"{name}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise WallfacerError(f"{name!r}: {error}") from None
    if len(data) > limit:
        raise WallfacerError(f"{_place(name)}: must be at most {limit} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise WallfacerError(f"{_place(name, line)}: is not UTF-8") from None


def compose_yaml(path: Path) -> yaml.Node | None:
    """Return the root node of a YAML file, with line numbers; None for an empty file.

    Anchors, aliases and tags are not supported.

    Raises:
        WallfacerError: The file is not YAML, or exceeds a limit.
    """
    import yaml

    text, name = read_text(path, YAML_BYTES), os.path.normpath(path)
    try:
        loader = _loader_class()(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise WallfacerError(f"{_place(name, line)}: not YAML: {_one_line(error.problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise WallfacerError(f"{_place(name, line)}: not YAML: {_one_line(error.reason)}") from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode
        raise WallfacerError(f"{_place(name, loader.line + 1)}: not YAML: {_one_line(error)}") from None


@dataclass(frozen=True)
class PlainFile:
    """The values of a YAML file.

    Attributes:
        data: content of the file: dicts with str keys, lists, str, int, float, bool and None.
        lines: line number of each entry. A key is a path such as ``host.messages[0].size``, or "" for the whole file.
    """

    data: Any
    lines: Mapping[str, int] = field(default_factory=dict)

    def line(self, entry: str) -> int:
        """Return the line number of an entry. If the entry is missing, return the line of its mapping or list."""
        while entry and entry not in self.lines:
            entry = entry[: max(entry.rfind("."), entry.rfind("["), 0)]
        return self.lines.get(entry, 1)


def read_yaml(path: Path) -> PlainFile:
    """Return the values of a YAML file.

    Raises:
        WallfacerError: The file is not YAML, exceeds a limit, repeats a key, or has an invalid number or date.
    """
    node, lines = compose_yaml(path), {"": 1}
    return PlainFile(None if node is None else _plain(node, "", os.path.normpath(path), lines), lines)


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        WallfacerError: The file is not JSON, exceeds a limit, repeats a key, or has NaN or Infinity.
    """
    text, name = read_text(path, JSON_BYTES), os.path.normpath(path)
    if text.count("[") + text.count("{") > JSON_CONTAINERS or text.count(",") > JSON_VALUES:
        raise WallfacerError(
            f"{_place(name)}: must hold at most {JSON_CONTAINERS} objects and lists, {JSON_VALUES} values"
        )
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise WallfacerError(f"{_place(name, error.lineno)}: cannot be read as JSON: {error.msg}") from None
    except RecursionError:
        raise WallfacerError(f"{_place(name)}: cannot be read as JSON: nested too deeply") from None
    except ValueError as error:
        line = text.count("\n", 0, _position_of_error(text)) + 1
        raise WallfacerError(f"{_place(name, line)}: cannot be read as JSON: {_one_line(error)}") from None


def _plain(node: yaml.Node, entry: str, name: str, lines: dict[str, int]) -> Any:
    import yaml

    lines[entry] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            where = _place(name, key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise WallfacerError(f"{where}: a key is a list or a mapping; must be a word or number")
            if key.value in found:
                raise WallfacerError(f"{where}: {_one_line(key.value)}: must occur only once")
            found[key.value] = _plain(value, f"{entry}.{key.value}" if entry else key.value, name, lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{entry}[{number}]", name, lines) for number, item in enumerate(node.value)]
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = getattr(error, "problem", None) or error
        raise WallfacerError(f"{_place(name, lines[entry])}: {_one_line(entry)}: {_one_line(problem)}") from None


def _loader_class() -> type:
    """Return a SafeLoader that limits the depth and does not support anchors, aliases and tags."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                self._reject(event, "anchors and aliases are not supported")
            if event.tag is not None:
                self._reject(event, "tags are not supported")
            if self.depth == DEPTH:
                self._reject(event, f"nested more than {DEPTH} deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def _reject(self, event: yaml.Event, problem: str) -> NoReturn:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

    return Loader


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice} must occur only once")
    return found


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _position_of_error(text: str) -> int:
    """Return the index in ``text`` of the object with the error. json's C scanner does not report the index."""
    position = 0

    class Decoder(json.JSONDecoder):
        def __init__(self) -> None:
            super().__init__(object_pairs_hook=_unique, parse_constant=_reject_constant)
            self.parse_object = self._object
            self.scan_once = json.scanner.py_make_scanner(self)

        def _object(self, start: tuple[str, int], *rest: Any) -> Any:
            nonlocal position
            position = start[1]
            return json.decoder.JSONObject(start, *rest)

    with suppress(ValueError, RecursionError):
        Decoder().decode(text)
    return position


def _place(name: str, line: int = 1) -> str:
    return f"{name}:{line}"


def _one_line(text: object) -> str:
    shown = " ".join(str(text).split())
    shown = "".join(one if one.isprintable() else "?" for one in shown)
    return shown if len(shown) <= 160 else f"{shown[:157]}..."
