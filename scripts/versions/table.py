"""The support table: made, read back from a document, and compared."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

BEGIN, END = "<!-- versions: written by python -m scripts.versions -->", "<!-- versions: end -->"
TOLERANCE = 1e-5
Findings = dict[str, str | float]


@dataclass(frozen=True)
class Row:
    """One Megatron. Each cell says ``ok`` or what was found instead."""

    megatron: str
    source: str
    hooks: str
    groups: str
    model: str
    loop: str


HEADINGS = ("Megatron", "from", "hooks", "groups, layers", "GPTModel, CP 2", "training loop, CP 2")


def row(source: str, findings: Findings, loop: str) -> Row:
    """What the probe found, and what the training loop gave."""
    version = str(findings.get("version", "?"))
    if trouble := findings.get("model"):
        return Row(version, source, _hooks(findings), str(trouble), str(trouble), loop)
    groups = next((str(findings[name]) for name in ("groups", "layers") if findings[name] != "ok"), "ok")
    return Row(version, source, _hooks(findings), groups, _model(findings), loop)


def difference(largest: float) -> str:
    """``ok`` within the tolerance, else the figure; a NaN is not within it."""
    return "ok" if largest <= TOLERANCE else f"differs by {largest:.1e}"


def _hooks(findings: Findings) -> str:
    """How many of the hooks for this version took; the first that did not and should have."""
    hooks = {name: str(found) for name, found in findings.items() if name.startswith("hook ")}
    absent = [name for name, found in hooks.items() if found.startswith("no megatron.training")]
    for name, found in hooks.items():
        if found != "ok" and name not in absent:
            return f"{name}: {found}"
    return "ok" if not absent else f"ok, {len(hooks) - len(absent)} of {len(hooks)}"


def _model(findings: Findings) -> str:
    wrong = {name: difference(float(findings[name])) for name in ("loss", "gradients")}
    return next((f"{name} {text}" for name, text in wrong.items() if text != "ok"), "ok")


def markdown(rows: list[Row]) -> str:
    """The table, between its markers."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(astuple(row) for row in rows)]
    return "\n".join([BEGIN, *(f"| {' | '.join(cells)} |" for cells in lines), END])


def read(document: str) -> list[Row]:
    """The rows of the table in a document.

    Raises:
        ValueError: there is none.
    """
    if BEGIN not in document or END not in document:
        raise ValueError(f"no table between '{BEGIN}' and '{END}'")
    lines = document.split(BEGIN)[1].split(END)[0].strip().splitlines()
    rows = [tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in lines[2:]]
    if any(len(cells) != len(fields(Row)) for cells in rows):
        raise ValueError(f"the table has not {len(fields(Row))} columns throughout")
    return [Row(*cells) for cells in rows]


def mismatches(found: list[Row], written: list[Row]) -> list[str]:
    """Where a document says something else than was found; checkouts that were not given are left out."""
    known = {(row.megatron, row.source): row for row in written}
    seen = {(row.megatron, row.source) for row in found}
    wrong = [f"written but not found: {row}" for row in written if row.source == "wheel" and _key(row) not in seen]
    for row in found:
        if known.get(_key(row)) != row:
            wrong.append(f"found: {row}; written: {known.get(_key(row))}")
    return wrong


def _key(row: Row) -> tuple[str, str]:
    return row.megatron, row.source
