"""``wallfacer view``: the page, and its view in a browser."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.plots.viewer.data import columns, page_data
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape, received_elements
from tests.plots.browser import browser, started, why_not

SHAPE = Shape(tokens=2, q_heads=32, kv_heads=8, head_dim=4)
SIZES = ((1280, 800), (390, 844))


def pairs(data: dict[str, Any], steps: list[dict[str, Any]]) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for step in steps:
        flat = step["tiles"]
        for _, q, k, row, row_end, col, col_end, causal in (flat[i : i + 8] for i in range(0, len(flat), 8)):
            for r in range(row, row_end):
                for c in range(col, col_end):
                    if not causal or c - col <= r - row:
                        found[data["blocks"][q][r], data["blocks"][k][c]] += 1
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_unmasked_pair_once_and_every_transfer(scheme: str, causal: bool) -> None:
    plan = make_plan(scheme, 8, q_heads=32, kv_heads=8)
    data = page_data(plan, SHAPE, causal=causal)
    unmasked = {(q, k): plan.grid.head for q in range(16) for k in range(16) if not causal or q >= k}
    for one, schedule_of in zip(data["passes"], (forward_schedule, backward_schedule), strict=True):
        assert pairs(data, one["steps"]) == unmasked
        schedules = [schedule_of(plan, rank, causal=causal, groups=1) for rank in range(8)]
        sent = Counter(
            (s.rank, m.peer, move.axis, move.payload, m.chunks)
            for s in schedules
            for move in s.transfers
            for m in move.sends
        )
        shown: Counter[Any] = Counter()
        for step in one["steps"]:
            for move in step["transfers"]:
                ends = move["ends"]
                for i in range(0, len(ends), 3):
                    chunks = data["blocks"][ends[i + 2]]
                    shown[ends[i], ends[i + 1], move["axis"], tuple(move["payload"]), chunks] += 1
        assert shown == sent
        received = max(received_elements(schedule, SHAPE) for schedule in schedules) / SHAPE.unit
        assert one["steps"][-1]["sum"] == pytest.approx(received, abs=1e-3)


def test_columns_follow_the_fastest_axis() -> None:
    assert columns(Grid(team=4, ring_outer=4), 8) == 4
    assert columns(Grid(ring_outer=16), 4) == 2
    assert columns(Grid(), 1) == 1


@pytest.mark.parametrize("scheme", ["ring", "team-ring", "all-gather"])
def test_a_large_page_is_small_and_alone(tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "grid.html"
    assert main(["view", "--cp-size", "64", "--scheme", scheme, "--ranks-per-node", "8", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    assert json.loads(found[1])["ranks"] == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cp-size 65", "cp_size=65: must be at most 64"),
        ("--cp-size 0", "cp_size=0: must be a positive number"),
        ("--ranks-per-node 0", "ranks_per_node=0: must be a positive number"),
        ("--kv-heads 3", "kv_heads=3: must be a divisor of 32"),
        ("--cp-size 2 --out /proc/no/page.html", "--out /proc/no/page.html: cannot be written: No such file"),
    ],
)
def test_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["view", *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(f"wallfacer: error: {message}")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with browser() as found:
        yield found


OVERFLOWING = """
const wide = document.documentElement.clientWidth, bad = [];
for (const e of document.querySelectorAll("body *:not(script):not(style)")) {
  if (e.closest(".scroll") || e.closest("details:not([open])")) continue;
  const box = e.getBoundingClientRect();
  if (box.right > wide + 1 || box.left < -1) bad.push(e.tagName + "#" + e.id);
  const scrolls = e.clientWidth && e.scrollWidth > e.clientWidth + 1;
  if (!(e instanceof SVGElement) && scrolls) bad.push(e.tagName + "." + e.id);
}
return bad"""
OVERLAPPING = """
const texts = [...document.querySelectorAll("h1, h2, p, dt, dd, button, label, li span, svg text")]
  .filter((e) => e.textContent.trim() && !e.closest("details")).map((e) => [e, e.getBoundingClientRect()]);
const bad = [];
texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
  if (a.contains(b) || b.contains(a)) return;
  const across = Math.min(r.right, s.right) - Math.max(r.left, s.left);
  const down = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
  if (across > 1 && down > 1)
    bad.push(a.textContent + " / " + b.textContent);
}));
return bad"""
DRAWN = """
const cells = [...document.querySelectorAll("#square rect[data-rank]")];
return cells.map((e) => [+e.dataset.q, +e.dataset.k, +e.dataset.rank])"""


def test_in_a_browser(driver: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    out = tmp_path / "grid.html"
    assert main(["view", "--cp-size", "8", "--ranks-per-node", "4", "--out", str(out)]) == 0
    data = page_data(make_plan("auto", 8, q_heads=32, kv_heads=8), SHAPE)
    driver.get(out.as_uri())
    count = sum(len(one["steps"]) for one in data["passes"])
    body = driver.find_element(By.TAG_NAME, "body")
    for index in range(count):
        shown = driver.execute_script("return [...document.querySelectorAll('#messages tr')].length")
        step = [step for one in data["passes"] for step in one["steps"]][index]
        assert shown == sum(len(move["ends"]) // 3 for move in step["transfers"])
        assert driver.find_element(By.ID, "text").text == step["text"]
        if index == len(data["passes"][0]["steps"]) - 1 or index == count - 1:
            drawn = driver.execute_script(DRAWN)
            assert sorted((q, k) for q, k, _ in drawn) == [(q, k) for q in range(16) for k in range(q + 1)]
        body.send_keys(Keys.ARROW_RIGHT)
    for size in SIZES:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )
        assert driver.execute_script(OVERFLOWING) == []
        assert driver.execute_script(OVERLAPPING) == []
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") in (
        [],
        ["data:,"],
    )


def test_a_driver_whose_port_is_taken_is_started_again(tmp_path: Path) -> None:
    driver = tmp_path / "chromedriver"
    taken_twice = '[ $(wc -l < "$0.calls") -gt 2 ] || exit 1'
    driver.write_text(f'#!/bin/sh\necho >> "$0.calls"\n{taken_twice}\necho started successfully\nexec sleep 60\n')
    driver.chmod(0o755)
    process, _ = started(str(driver))
    process.kill()
    process.communicate()
    assert (tmp_path / "chromedriver.calls").read_text() == "\n" * 3
