"""Rows: losses and gradients that Megatron would compute otherwise."""

from __future__ import annotations

from tests.faults.row import Row

ROWS: tuple[Row, ...] = ()
