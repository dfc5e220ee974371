"""Load a preset: a file, the files that it extends, and flags and variables from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.entry import COMMAND_LINE, NO_GPU, Location, PresetEntry
from megatron_wallfacer.presets.preset_file import ENVIRONMENT, MODEL, SECTIONS, TORCHRUN, PresetFile, read_preset_file
from megatron_wallfacer.shipped import CONFIGS

#: Largest number of files of a preset. A file that is extended several times counts several times.
MAX_FILES = 64


@dataclass(frozen=True)
class Preset:
    """A training job: its flags and environment variables, each with the file and the line that set it.

    Attributes:
        path: file of the preset.
        variables: environment variables by name.
        torchrun: torchrun flags by name.
        model: Megatron's and the plugin's flags by name.
        statements: remarks on tests, measurements and limits of the preset. The keys are ``validated_on``, ``measured``
            and ``known_limitations``. Remarks in files that the preset extends are ignored.
    """

    path: Path
    variables: dict[str, PresetEntry]
    torchrun: dict[str, PresetEntry]
    model: dict[str, PresetEntry]
    statements: dict[str, tuple[str, ...]]

    @property
    def environment(self) -> dict[str, str]:
        """Value of each environment variable that the preset sets, by name."""
        return {name: entry.values[0] for name, entry in self.variables.items() if entry.values}

    @property
    def argv(self) -> list[str]:
        """Arguments of the Megatron script."""
        return [argument for entry in self.model.values() for argument in entry.arguments]

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return torchrun.ranks(self.torchrun)

    @property
    def on_gpus(self) -> bool:
        """Whether the preset's CUDA_VISIBLE_DEVICES leaves GPUs visible to the ranks."""
        return self.environment.get("CUDA_VISIBLE_DEVICES", "all") not in NO_GPU

    @property
    def is_shipped(self) -> bool:
        """Whether the file is one of the plugin's presets."""
        return self.path.resolve().is_relative_to(CONFIGS.resolve())

    def location(self, name: str) -> Location | None:
        """Return the location of a flag or variable, or None if the preset does not contain it."""
        entry = self.model.get(name) or self.torchrun.get(name) or self.variables.get(name)
        return entry.location if entry else None


def load_preset(path: Path, arguments: Sequence[str] = (), variables: Iterable[str] = ()) -> Preset:
    """Read a preset. The command line overrides the file, and the file overrides the files that it extends.

    Args:
        path: file, or name of a preset of the plugin.
        arguments: flags of Megatron, the plugin and torchrun from the command line of ``wallfacer``.
        variables: environment variables from the command line of ``wallfacer``, in the form ``NAME=VALUE``.

    Raises:
        WallfacerError: An entry is invalid. The error message has the file and the line number of the entry.
    """
    merged: dict[str, dict[str, PresetEntry]] = {name: {} for name in SECTIONS}
    path = _preset_path(path)
    files = _files(path, COMMAND_LINE, (), count(1))
    for file in files:
        for name, entries in file.sections.items():
            merged[name].update(entries)
    for entry in _flag_entries(arguments):
        merged[TORCHRUN if entry.name in torchrun.FLAGS else MODEL][entry.name] = entry
    for entry in _variable_entries(variables):
        merged[ENVIRONMENT][entry.name] = entry
    model = {name: entry for name, entry in merged[MODEL].items() if entry.values is not None}
    return Preset(path, merged[ENVIRONMENT], merged[TORCHRUN], model, files[-1].statements)


def _preset_path(path: Path) -> Path:
    """Return the path of a preset's file, such as ``configs/tiny-cpu.yaml`` for ``tiny-cpu``."""
    shipped = CONFIGS / f"{path}.yaml"
    if path.suffix or path.is_file():
        return path
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise WallfacerError(f"{path}: must be a file or one of the presets {names}")
    return shipped


def _files(path: Path, named_at: Location, extended_by: tuple[Path, ...], numbers: Iterator[int]) -> list[PresetFile]:
    """Return the files that the file ``path`` extends, then the file itself.

    ``named_at`` is the location of the entry that names ``path``. ``extended_by`` has the files that extend ``path``.
    ``numbers`` yields 1, 2, ... to number the files of the preset.
    """
    real = path.resolve()
    if real in extended_by:
        raise WallfacerError(f"{named_at}: extends {path}, which extends this file in turn")
    if next(numbers) > MAX_FILES:
        raise WallfacerError(f"{named_at}: extends {path}: a preset must consist of at most {MAX_FILES} files")
    file = read_preset_file(path)
    below = [_files(target, location, (*extended_by, real), numbers) for target, location in file.extends]
    return [*(lower for files in below for lower in files), file]


def _flag_entries(arguments: Sequence[str]) -> Iterator[PresetEntry]:
    """Yield one :class:`PresetEntry` per flag on the command line. ``--flag=false`` removes a flag from the preset."""
    for flag, following in _grouped(arguments):
        name, equals, value = flag.partition("=")
        values = ((value,) if equals else ()) + tuple(following)
        entry = PresetEntry(name, None if flag == f"{name}=false" else values, COMMAND_LINE)
        if name in torchrun.FLAGS:
            if entry.values is None or len(entry.values) != 1:
                raise WallfacerError(f"{name}: must have one value")
            torchrun.check_torchrun(entry)
        yield entry


def _variable_entries(assignments: Iterable[str]) -> Iterator[PresetEntry]:
    """Yield the entries of ``--env NAME=VALUE``."""
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise WallfacerError(f"--env {assignment}: must be NAME=VALUE")
        yield PresetEntry(name, (value,), COMMAND_LINE)


def _grouped(arguments: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each flag with the arguments up to the next flag."""
    starts = [index for index, argument in enumerate(arguments) if argument.startswith("--")]
    if arguments and starts[:1] != [0]:
        raise WallfacerError(f"{arguments[0]}: must be a flag; only Megatron's flags follow CONFIG")
    for start, end in pairwise([*starts, len(arguments)]):
        yield arguments[start], arguments[start + 1 : end]
