"""A whole preset: a file, the files that it extends, and what was typed, one on top of the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.command_line import typed_settings, typed_variables
from megatron_wallfacer.presets.entry import COMMAND_LINE, Origin, Setting
from megatron_wallfacer.presets.preset_file import ENVIRONMENT, MODEL, SECTIONS, TORCHRUN, Source, read_source
from megatron_wallfacer.shipped import CONFIGS

#: Files of a preset, each as often as it is extended: two that are extended twice each are four.
FILES = 64
#: Values of CUDA_VISIBLE_DEVICES with which the launcher trains on the CPU.
_NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class Preset:
    """What is to be run, and where each part of it comes from.

    Attributes:
        path: of the file.
        variables, torchrun, model: settings by name; flags that are left out are gone.
    """

    path: Path
    variables: dict[str, Setting]
    torchrun: dict[str, Setting]
    model: dict[str, Setting]

    @property
    def environment(self) -> dict[str, str]:
        """Variables to set."""
        return {name: setting.words[0] for name, setting in self.variables.items() if setting.words}

    @property
    def argv(self) -> list[str]:
        """Megatron's arguments and the plugin's."""
        return [word for setting in self.model.values() for word in setting.typed]

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return torchrun.ranks(self.torchrun)

    @property
    def on_gpus(self) -> bool:
        """Whether it leaves the launcher any GPU; else it trains on the CPU."""
        return self.environment.get("CUDA_VISIBLE_DEVICES", "all") not in _NO_GPU

    @property
    def is_shipped(self) -> bool:
        """Whether the file comes with the plugin; what is typed besides does not matter."""
        return self.path.resolve().is_relative_to(CONFIGS.resolve())

    def origin(self, name: str) -> Origin | None:
        """Where a flag or variable was written; None where it was not."""
        found = self.model.get(name) or self.torchrun.get(name) or self.variables.get(name)
        return found.origin if found else None


def load_preset(path: Path, words: Sequence[str] = (), variables: Iterable[str] = ()) -> Preset:
    """Read a preset; what was typed beats the file, and a file beats those that it extends.

    Args:
        path: of the file; of one that comes with the plugin its name is enough.
        words: typed flags, Megatron's, the plugin's and torchrun's.
        variables: typed as ``NAME=VALUE``.

    Raises:
        WallfacerError: one line; with file and line number where it is a file's fault.
    """
    merged: dict[str, dict[str, Setting]] = {name: {} for name in SECTIONS}
    path = preset_path(path)
    for source in _stack(path, COMMAND_LINE, (), [0]):
        for name, settings in source.sections.items():
            merged[name].update(settings)
    for setting in typed_settings(words):
        merged[TORCHRUN if setting.name in torchrun.FLAGS else MODEL][setting.name] = setting
    for setting in typed_variables(variables):
        merged[ENVIRONMENT][setting.name] = setting
    kept = {name: setting for name, setting in merged[MODEL].items() if setting.words is not None}
    return Preset(path, merged[ENVIRONMENT], merged[TORCHRUN], kept)


def preset_path(path: Path) -> Path:
    """The file that is meant: ``tiny-cpu`` is the plugin's ``configs/tiny-cpu.yaml``, wherever it is installed.

    Raises:
        WallfacerError: it is neither a file nor a name.
    """
    own = CONFIGS / f"{path}.yaml"
    if path.suffix or path.is_file():
        return path
    if not own.is_file():
        names = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml")))
        raise WallfacerError(f"{path}: is neither a file nor a preset; presets are {names}")
    return own


def _stack(path: Path, named: Origin, above: tuple[Path, ...], count: list[int]) -> list[Source]:
    """The sources of a file, what it extends below it.

    Args:
        path: of the file.
        named: where it is named.
        above: the files that extend it, the outermost first.
        count: files that were read up to now.
    """
    real = path.resolve()
    if real in above:
        raise WallfacerError(f"{named}: extends {path}, which extends this file in turn")
    count[0] += 1
    if count[0] > FILES:
        raise WallfacerError(f"{named}: extends {path}: must be at most {FILES} files in all")
    source = read_source(path)
    below = [_stack(target, origin, (*above, real), count) for target, origin in source.extends]
    return [*(lower for stack in below for lower in stack), source]
