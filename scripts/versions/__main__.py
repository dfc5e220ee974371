"""The command; see the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, MODEL_BUILDER
from megatron_wallfacer.training_runs.corpus import build_corpus, tokenizer_arguments
from megatron_wallfacer.training_runs.local_run import train
from scripts.versions.table import Findings, Row, difference, markdown, mismatches, read, row
from scripts.versions.wheels import WHEELS, unpack

REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = REPOSITORY / "runs" / "versions"
ITERATIONS, TIMEOUT_S = 3, 600
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 "
    "--lr-decay-style constant --clip-grad 1.0 --seed 1234 --hidden-dropout 0 --attention-dropout 0 --split 98,2,0 "
    f"--eval-iters 0 --log-interval 1 --train-iters {ITERATIONS}"
).split()
SPLIT = ["--wallfacer-cp-size", "2"]


def main() -> int:
    """Try every version; 1 where a document says otherwise, or nothing says ok."""
    parser = argparse.ArgumentParser(prog="python -m scripts.versions", description=__doc__)
    parser.add_argument("--check", metavar="FILE", type=Path, help="compare with the table in this document")
    parser.add_argument("--only", metavar="X", action="append", help="of the wheels, these releases only")
    options = parser.parse_args()
    found = [_wheel(release) for release in options.only or WHEELS]
    found += [_checkout(Path(path)) for path in os.environ.get("MEGATRON_PATHS", "").split(":") if path]
    print(markdown(found))
    if options.check is None:
        return 0
    wrong = mismatches(found, read(options.check.read_text()))
    for line in wrong:
        print(f"versions: {options.check}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _wheel(release: str) -> Row:
    folder = unpack(release, RUNS)
    findings = _probe(folder)
    version = tuple(map(int, release.split(".")[:2]))
    if version < FIRST_LAUNCHED:
        return row("wheel", findings, "none in the wheel")
    scripts = REPOSITORY / "scripts"
    script = scripts / "pretrain_gpt.py" if version >= MODEL_BUILDER else scripts / "versions" / "loop.py"
    return row("wheel", findings, _loop(script, folder, version))


def _checkout(folder: Path) -> Row:
    """A checkout brings its own pretrain_gpt.py, which is run as it is."""
    findings = _probe(folder)
    version = tuple(map(int, str(findings.get("version", "0.0")).split(".")[:2]))
    if version < FIRST_LAUNCHED:
        return row("checkout", findings, "not tried")
    return row("checkout", findings, _loop(folder / "pretrain_gpt.py", folder, version))


def _probe(folder: Path) -> Findings:
    """What the probe says of a folder with a `megatron` package, in a process of its own."""
    print(f"versions: {folder}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "scripts.versions.probe", str(folder)]
    done = subprocess.run(command, env=_environment(folder), capture_output=True, text=True, timeout=TIMEOUT_S)
    log = RUNS / f"{folder.name}-probe.log"
    log.write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    return json.loads(last[0]) if done.returncode == 0 else {"model": f"exit code {done.returncode}, see {log}"}


def _loop(script: Path, folder: Path, version: tuple[int, ...]) -> str:
    """Three iterations under our launcher, on two ranks with the plugin and on one without."""
    data = ["--data-path", str(build_corpus(REPOSITORY / "runs" / "corpus")), *tokenizer_arguments(version)]
    os.environ.update(_environment(folder))
    try:
        whole, split = (
            train(script, ranks, [*MODEL, *data, *flags], RUNS / f"{folder.name}-{ranks}.log", lambda _: None)
            for ranks, flags in ((1, []), (2, SPLIT))
        )
    except WallfacerError as error:
        print(f"versions: {error}", file=sys.stderr)
        return str(error).splitlines()[0]
    if not len(whole) == len(split) == ITERATIONS:
        return f"{len(split)} iterations of {len(whole)}"
    return difference(max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(split, whole, strict=True)))


def _environment(folder: Path) -> dict[str, str]:
    """This Megatron before the environment's own, and nothing compiled for a GPU at import (0.15 does)."""
    paths = f"{folder}{os.pathsep}{REPOSITORY}"
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": "/nonexistent"}
    return os.environ | quiet | {"PYTHONPATH": paths}


if __name__ == "__main__":
    sys.exit(main())
