"""Tables and pictures of the results of experiments, for docs/measurements.md or a page of their own.

A page has places for them, `<!-- table devices -->` to `<!-- end -->`, between which all is written anew;
a page that is not there yet is made of the tables alone. Pictures stand beside the page, as PNG.
"""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path

from bench.experiments.page_tables import TABLES, TableMaker, conditions
from bench.experiments.results import Results
from bench.experiments.tables import Found
from tpimpi.errors import InputError

_PLACE = re.compile(r"<!-- table (\w+) -->.*?<!-- end -->", re.S)
_MARK = re.compile(r"<!-- (?:table (\w+)|end) -->")
_EMPTY = "# Measurements\n\n" + "\n\n".join(f"<!-- table {name} -->\n<!-- end -->" for name in TABLES) + "\n"


def newest(results: Results) -> tuple[list[Found], list[Found]]:
    """Of each row the newest result, in the order in which rows were first measured: on one machine, that which has most of
    them; and those of other machines, which a table must not mix with these."""
    machines: dict[str, dict[str, Found]] = {}
    for line in results.lines:
        by_row = machines.setdefault(repr(sorted(line["machine"].items())), {})
        by_row[repr(sorted(line["settings"].items()))] = Found(line)
    most = max(machines, key=lambda machine: len(machines[machine]), default=None)
    others = [each for machine, found in machines.items() if machine != most for each in found.values()]
    return (list(machines[most].values()) if most is not None else []), others


def write_page(page: Path, results: Results) -> None:
    """Fill in, or make, the page. Raises InputError where that cannot be."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a page has pictures, which need matplotlib; do: pip install 'matplotlib>=3.8'")
    found, others = newest(results)
    tables: dict[str, TableMaker] = {**TABLES, "conditions": partial(conditions, others=others)}
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        text = page.read_bytes().decode() if page.exists() else _EMPTY
        end = "\r\n" if "\r\n" in text else "\n"
        marks = [(match[1] or "end", text.count("\n", 0, match.start()) + 1) for match in _MARK.finditer(text)]
        for (name, line), (after, _) in zip(marks, [*marks[1:], ("", 0)], strict=True):
            if name != "end" and after != "end":
                raise InputError(f"{page}, line {line}: table {name} has no <!-- end -->; add it")
            if name != "end" and name not in TABLES:
                raise InputError(f"{page}, line {line}: there is no table {name}; there are {', '.join(TABLES)}")
        made = {name: tables[name](found, page.parent) for name, _ in marks if name != "end"}
        text = _PLACE.sub(lambda match: f"<!-- table {match[1]} -->\n\n{made[match[1]]}\n\n<!-- end -->", text)
        new = page.with_name(f".{page.name}.new")
        try:
            new.write_bytes(re.sub(r"\r?\n", end, text).encode())
            new.replace(page)
        finally:
            new.unlink(missing_ok=True)
    except UnicodeDecodeError as error:
        raise InputError(f"--page {page} is no text in UTF-8; give another one") from error
    except OSError as error:
        raise InputError(f"--page {page}: {error.strerror}; give another place") from error
    except KeyError as error:
        raise InputError(
            f"{results.path} has results without {error}; remove those lines, or measure them again"
        ) from error
