"""Metadata of the package. How to build it, ruff and pytest are in pyproject.toml."""

import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def version() -> str:
    """`__version__` of the package, read as text: importing it here would need what is not installed yet."""
    source = (HERE / "megatron_wallfacer" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_wallfacer/__init__.py has no line __version__ = "..."')
    return found.group(1)


#: The table of Megatron releases, read as a file: it imports nothing of the package.
RELEASES = runpy.run_path(str(HERE / "megatron_wallfacer" / "megatron" / "releases.py"))

REQUIRED = [
    # The lower bound of Megatron-Core 0.17 to 0.19 itself. What we use is older: all_gather_into_tensor,
    # all_to_all_single, batch_isend_irecv, and reduce_scatter_tensor with async_op on gloo (2.3).
    # Run with 2.13 to 2.15: 2.6 to 2.12 are believed, not tested.
    "torch>=2.6,<3",
    "numpy>=1.26,<3",  # corpus and losses; 1.26 is the first for Python 3.12
    "rich>=13,<16",  # tables and progress bars of the command line
    "matplotlib>=3.8,<4",  # pictures; 3.8 is the first for Python 3.12
    "psutil>=5.9,<8",  # network interfaces and their addresses in `wallfacer doctor`
    "shtab>=1.7,<2",  # shell completion, written from the parsers
    "PyYAML>=6,<7",  # presets and clusters; read as nodes, which know their lines
]

MEGATRON = [
    # On GPUs Megatron-LM is usually a checkout in a container, so Megatron is an extra. [training] is what
    # `megatron.training` imports.
    RELEASES["REQUIREMENT"],
]

DOCS = [
    "sphinx>=8,<10",  # builds docs/ as a site
    "myst-parser>=4,<6",  # lets it read Markdown, which the pages are
    "furo>=2024.8,<2027",  # theme that fetches nothing; versions are dates
]


class BuildWithConfigs(build_py):
    """Put what `megatron_wallfacer/shipped.py` looks for into the wheel; an editable install sees the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            inside = Path(self.build_lib) / "megatron_wallfacer"
            shutil.copytree(HERE / "configs", inside / "configs", dirs_exist_ok=True)
            (inside / "scripts").mkdir(exist_ok=True)
            shutil.copy(HERE / "scripts" / "pretrain_gpt.py", inside / "scripts")


setup(
    name="megatron-wallfacer",
    version=version(),
    description="WallFacer for Megatron-LM: context parallelism on any grid of ranks, as a plugin",
    license="Apache-2.0",
    python_requires=">=3.12",  # as Megatron-Core 0.17 and later
    packages=find_packages(include=["megatron_wallfacer*"]),
    package_data={"megatron_wallfacer": ["py.typed", "planning/data/*.csv", "plots/viewer/page.*"]},
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=REQUIRED,
    extras_require={
        "megatron": MEGATRON,
        # Kernels are compiled against the torch that is there: pip install --no-build-isolation. Bounds not tested.
        "te": ["transformer-engine[pytorch]>=2.1,<3"],  # attention kernels of Megatron's own containers
        "flash": ["flash-attn>=2.6,<3"],  # attention kernels without Transformer Engine
        "docs": DOCS,
        "dev": [
            *MEGATRON,  # the tests train with it
            *DOCS,  # a test builds the site
            "pytest>=8,<10",  # tests
            "pytest-xdist>=3.6,<4",  # two test files at a time: most wait for ranks that start
            "hypothesis>=6.100,<7",  # property tests of the schedules
            "selenium>=4.20,<5",  # drives Chromium through the page of a grid
            "ruff>=0.9,<1",  # lint and format
            "tensorboard>=2.16,<3",  # a test reads back what --wallfacer-log-metrics writes
        ],
    },
    entry_points={"console_scripts": ["wallfacer = megatron_wallfacer.cli.main:main"]},
)
