"""Schedules stay what they are when code and names change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.schedule import backward_schedule
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from tests.schedule.canonical import DIGESTS, canonical_form, digest, digest_keys


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schedules_are_those_of_the_file(scheme: str) -> None:
    expected = json.loads(DIGESTS.read_text())
    keys = [key for key in digest_keys() if key.split()[0] == scheme]
    changed = [key for key in keys if digest(key) != expected[key]]
    assert not changed


def test_the_file_has_no_other_keys() -> None:
    assert list(json.loads(DIGESTS.read_text())) == list(digest_keys())


@pytest.fixture
def schedule() -> Schedule:
    return backward_schedule(make_plan("team-ring", 8, team_size=2), 3)


def test_the_form_has_no_names(schedule: Schedule) -> None:
    assert not any(name in canonical_form(schedule) for name in schedule.values)


def test_the_form_differs_where_an_operation_is_dropped(schedule: Schedule) -> None:
    for index in range(len(schedule.ops)):
        shorter = replace(schedule, ops=schedule.ops[:index] + schedule.ops[index + 1 :])
        assert canonical_form(shorter) != canonical_form(schedule)


def test_the_form_differs_where_two_operations_are_swapped(schedule: Schedule) -> None:
    ops = schedule.ops
    for index in range(len(ops) - 1):
        swapped = replace(schedule, ops=(*ops[:index], ops[index + 1], ops[index], *ops[index + 2 :]))
        assert canonical_form(swapped) != canonical_form(schedule)
