"""Hostile presets, clusters and traces: one line with file and line number, within 2 s and 500 MB.

``WALLFACER_FUZZ_EXAMPLES=100000 python -m pytest tests/test_input_files.py -k fuzz`` runs for longer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.config import load_config
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.input_files import JSON_BYTES, YAML_BYTES
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.presets.preset import MAX_FILES, load_preset
from megatron_wallfacer.traces.timelines import read_timelines

REPOSITORY = Path(__file__).parents[1]
CLUSTER = "nodes: 2\ngpus_per_node: 4\ndevice: {tflops: 100}\nintra: {gbyte_s: 100}\ninter: {gbyte_s: 25}\n"
BENCHMARK = (REPOSITORY / "benchmarks" / "configs" / "smoke-2x2.yaml").read_text()
PRESET = "ENV_VARS: {A: b}\nTORCHRUN_ARGS: {--nproc-per-node: 2}\nMODEL_ARGS:\n  --lr: 1e-5\n"
EVENTS: list[dict[str, object]] = [
    {"ph": "M", "pid": 0, "tid": 1, "name": "thread_name", "args": {"name": "pass"}},
    {"ph": "X", "pid": 0, "tid": 1, "name": "forward", "ts": 0, "dur": 5.5},
    {"ph": "b", "pid": 0, "id": 1, "cat": "moves", "name": "a", "ts": 1},
    {"ph": "e", "pid": 0, "id": 1, "cat": "moves", "name": "a", "ts": 2},
]
TRACE = json.dumps({"traceEvents": EVENTS}, indent=1)
ORIGIN = {"rank": 0, "ranks": 1, "run": "a", "device": "cpu", "host": "h", "wall_s": 0.5}
TIMELINE = (
    f'{{\n"traceEvents": [\n{json.dumps(EVENTS[0])},\n{json.dumps(EVENTS[1])}\n],\n"otherData": {json.dumps(ORIGIN)}}}'
)
READERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cluster": (load_cluster, "file.yaml", CLUSTER),
    "preset": (load_preset, "file.yaml", PRESET),
    "trace": (read_timelines, "file.json", TRACE),
    "timeline": (lambda path: read_timelines(path.parent), "rank-0.json", TIMELINE),
    "benchmark": (load_config, "file.yaml", BENCHMARK),
}
DEEP = "[" * 500 + "]" * 500
#: Reader, content, line, what is said.
HOSTILE: dict[str, tuple[str, str | bytes, int, str]] = {
    "NaN": ("cluster", CLUSTER.replace("100}", ".nan}", 1), 3, "device.tflops=nan: must be a positive number"),
    "an infinite rate": ("cluster", CLUSTER.replace("25", ".inf"), 5, "inter.gbyte_s=inf: must be from 1e-06"),
    "a rate that is nearly nothing": ("cluster", CLUSTER.replace("25", "1e-300"), 5, "inter.gbyte_s='1e-300'"),
    "a rate of nearly nothing": ("cluster", CLUSTER.replace("25", "1.0e-300"), 5, "must be from 1e-06 to 1e+15"),
    "a million nodes": ("cluster", CLUSTER.replace("2", "1000000", 1), 1, "nodes=1000000: must be at most 100000"),
    "a number of 5000 digits": ("cluster", CLUSTER.replace("2", "9" * 5000, 1), 1, "nodes: "),
    "a date that is none": ("cluster", CLUSTER.replace("2", "2024-99-99", 1), 1, "nodes: month must be in 1..12"),
    "a benchmark's NaN": ("benchmark", BENCHMARK.replace("10}", ".nan}"), 4, "compute.gflops_per_rank=nan: must be"),
    "a benchmark's infinite rate": (
        "benchmark",
        BENCHMARK.replace("200", ".inf"),
        2,
        "topology.inter_mbit=inf: must be",
    ),
    "a benchmark's 5000 digits": ("benchmark", BENCHMARK.replace("1024", "9" * 5000), 3, "shape.tokens: "),
    "a benchmark's many tokens": ("benchmark", BENCHMARK.replace("1024", "9" * 400), 3, "shape.tokens=9"),
    "a deep benchmark": ("benchmark", BENCHMARK + f"schemes: {DEEP}", 5, "not YAML: nested more than 16 deep"),
    "a benchmark's alias": ("benchmark", BENCHMARK + "schemes: *a\n", 5, "anchors and aliases are not supported"),
    "a benchmark's unknown entry": ("benchmark", BENCHMARK + "other: 1\n", 5, "other: is not an entry that exists"),
    "deep": ("cluster", CLUSTER + f"levels: {DEEP}", 6, "not YAML: nested more than 16 deep"),
    "deep preset": ("preset", f"MODEL_ARGS: {DEEP}", 1, "not YAML: nested more than 16 deep"),
    "twice": ("cluster", CLUSTER + "nodes: 3\n", 6, "nodes: must occur only once"),
    "a tag": ("cluster", CLUSTER + "nics: !!python/object:os.system 1\n", 6, "not YAML: tags are not supported"),
    "an anchor": ("cluster", CLUSTER.replace("2", "&a 2", 1), 1, "not YAML: anchors and aliases are not supported"),
    "an alias": ("preset", "MODEL_ARGS: *a\n", 1, "not YAML: anchors and aliases are not supported"),
    "two documents": ("cluster", CLUSTER + "---\na: 1\n", 6, "not YAML: but found another document"),
    "not UTF-8": ("cluster", CLUSTER.encode() + b"nics: \xff\n", 6, "is not UTF-8"),
    "a NUL": ("preset", PRESET + "\0", 5, "not YAML: special characters are not allowed"),
    "an escape beyond Unicode": ("preset", 'MODEL_ARGS: {--x: "\\UFFFFFFFF"}', 1, "not YAML"),
    "a large file": ("preset", "#" * (YAML_BYTES + 1), 1, f"must be at most {YAML_BYTES} bytes"),
    "nothing": ("cluster", "", 1, "the file: must be a mapping, not NoneType"),
    "a trace with NaN": ("trace", TRACE.replace("5.5", "NaN"), 12, "NaN is no number"),
    "a trace with 1e999": ("trace", TRACE.replace("5.5", "1e999"), 12, "inf must be a number of microseconds"),
    "an event that is none": (
        "trace",
        TRACE.replace('"ph": "b"', '"pH": "b"'),
        20,
        "is not an event of --wallfacer-timeline",
    ),
    "an origin that is none": (
        "timeline",
        TIMELINE.replace('"ranks": 1', '"ranks": "two"'),
        6,
        "the fields run, node and clock cannot be read",
    ),
    "another rank's events": (
        "timeline",
        TIMELINE.replace('"pid": 0', '"pid": 1'),
        3,
        "must contain rank 0 only, contains rank 1",
    ),
    "a trace with a key twice": ("trace", TRACE.replace('"ts": 0', '"pid": 0'), 12, "the key pid must occur only once"),
    "a deep trace": ("trace", '{"traceEvents": ' + "[" * 100_000, 1, "nested too deeply"),
    "a large trace": ("trace", "[" + "0," * 1_500_001 + "0]", 1, "must hold at most 250000 objects and lists"),
    "a trace that ends early": ("trace", TRACE[:-4], 36, "cannot be read as JSON"),
    "no trace": ("trace", "{}", 1, "must be a trace"),
    "a trace without a list": ("trace", '{"a": [{}],\n"traceEvents": 5}', 2, "must be a trace with a list traceEvents"),
}


def write(folder: Path, reader: str, content: str | bytes) -> tuple[Callable[[Path], object], Path]:
    read, name, _ = READERS[reader]
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return read, path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_with_its_number(name: str, tmp_path: Path) -> None:
    reader, content, line, message = HOSTILE[name]
    read, path = write(tmp_path, reader, content)
    start = time.thread_time()
    with pytest.raises(WallfacerError) as error:
        read(path)
    assert time.thread_time() - start < 2
    assert str(error.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_not_read(reader: str, tmp_path: Path) -> None:
    read, name, _ = READERS[reader]
    os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / name, tmp_path / "link", tmp_path / "absent.yaml", Path("/proc/self/mem")):
        with pytest.raises(WallfacerError) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_files_that_extend_one_another_many_times(tmp_path: Path) -> None:
    """Twenty files that extend the next one twice are a million; a chain of 500 is a traceback."""
    for kind, count, times in (("wide", 20, 2), ("long", 500, 1)):
        for number in range(count):
            below = f"extends: [{', '.join([f'{kind}{number + 1}.yaml'] * times)}]\n" if number + 1 < count else PRESET
            (tmp_path / f"{kind}{number}.yaml").write_text(below)
        with pytest.raises(
            WallfacerError, match=rf"{kind}\d+.yaml:1: extends .*: a preset must consist of at most {MAX_FILES} files"
        ):
            load_preset(tmp_path / f"{kind}0.yaml")


def test_memory_stays_below_500_mb(tmp_path: Path) -> None:
    """The largest files that are read at all, in a process of their own."""
    full = "[" + ",".join(["{}"] * 249_000) + "," + ",".join(["1.5"] * 1_200_000) + "]"
    write(tmp_path, "trace", full + " " * (JSON_BYTES - len(full)))
    text = (
        "import re, sys; from pathlib import Path\n"
        "from megatron_wallfacer.input_files import read_json\n"
        # Of this program alone: getrusage has the peak of the process that forked it, too.
        "read_json(Path(sys.argv[1])); print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", text, str(tmp_path / "file.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500_000


# --- fuzzing ---

EXAMPLES = int(os.environ.get("WALLFACER_FUZZ_EXAMPLES", "40"))
PIECES = [
    *("{", "}", "[", "]", ":", ",", "-", "&a", "*a", "!!set", "<<: ", "? ", "|", ">", "'", '"', "#", "---", "%YAML 9"),
    *(".nan", "-.inf", "1e999", "0x", "0o9", "2024-13-01", "1:99:99", "~", "true", "9" * 400, "\t", "\n", "\x85", "é"),
    *("nodes", "host", "levels", "MODEL_ARGS", "extends: [file.yaml]", "--lr", "traceEvents", '"ts": NaN', "\ud800"),
]


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@example(data=None)
def test_fuzzed_files_are_read_or_rejected_in_one_line(reader: str, data: st.DataObject | None, tmp_path: Path) -> None:
    read, _, good = READERS[reader]
    read, path = write(tmp_path, reader, good)
    if data is None:
        read(path)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(good)))
        end = data.draw(st.integers(start, min(len(good), start + 12)))
        good = good[:start] + data.draw(st.sampled_from(PIECES) | st.text(max_size=4)) + good[end:]
    write(tmp_path, reader, good)
    said = error_text(read, path)
    assert "\n" not in said
    # What is missing in a folder has no line.
    missing = rf"|{re.escape(str(path.parent))}: ranks? .* missing; " if reader == "timeline" else ""
    assert not said or re.match(rf"{re.escape(str(path))}:\d+: {missing}", said), said


def error_text(read: Callable[[Path], object], path: Path) -> str:
    """What is said of a file that cannot be used, else nothing."""
    try:
        read(path)
    except WallfacerError as error:
        return str(error)
    return ""
