"""Rows: files, folders, signals, restarts, Slurm."""

from __future__ import annotations

from tests.faults.row import Row

ROWS: tuple[Row, ...] = ()
