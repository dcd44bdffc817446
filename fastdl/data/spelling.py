"""How people write numbers: 1234.5, 1,234.5, 1.234,5, 1 234, $5, 50%, 12 kg.

A column has one `Spelling`, which all its cells must share; what only Python takes for a number (``1_000``, digits of
other scripts) is text. It is decided once, by `spelling_of`, and kept with the model: "1,234" alone may be either
1234 or 1.234, so another table must be read as the one of the training was.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

#: Longer cells are no numbers; it bounds the time that a pattern may take.
LONGEST = 80

_BLANKS = "\u00a0\u2009\u202f"
_SAME = str.maketrans(_BLANKS + "\u2019", "   '")
_CURRENCY = r"[A-Za-z]{0,3}[$€£¥₹₽₩₺₫₴₪₱฿¢]|USD|EUR|GBP|JPY|CHF|CNY|INR|CAD|AUD|Rs\.?"
_CELL = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<before>{_CURRENCY})? ?(?P<inner>[+-]?)"
    r"(?P<body>\.?\d(?:[\d.,' ]*\d)?[.,]?(?:[eE][+-]?\d+)?)"
    r" ?(?P<after>[^\d\s+\-\u2212.,'_:/][^\d]{0,19}[23]?)?",
    re.ASCII,
)
#: (what looks like a number, what it would be, why it is neither read as one nor taken for text)
_DOUBTFUL = [
    (re.compile(r"([+-]?\d+)_\d[\d_.]*", re.ASCII), r"\1", "{!r} may be a number or a code: write it without '_'"),
    (re.compile(r"[\u2010-\u2015\u2212]"), "-", "{!r} begins with a sign that is no minus: write '-'"),
]


def _body(group: str, decimal: str) -> re.Pattern[str]:
    """Digits with this separator of groups (thousands, or lakhs: 12,34,567) and this decimal sign."""
    g, d = re.escape(group), re.escape(decimal)
    whole = rf"(?:[1-9]\d{{0,2}}(?:{g}\d{{2,3}})*{g}\d{{3}}|\d+)" if group else r"\d+"
    return re.compile(rf"(?:{whole}(?:{d}\d*)?|{d}\d+)(?:[eE][+-]?\d+)?", re.ASCII)


#: (separator of groups, decimal sign), in the order in which they are tried.
_STYLES = {style: _body(*style) for style in [("", "."), (",", "."), (".", ","), (" ", "."), (" ", ","), ("'", ".")]}


@dataclass(frozen=True)
class Spelling:
    """One way to write numbers: ``before`` 1 ``group`` 234 ``decimal`` 5 ``after``."""

    group: str = ""
    decimal: str = "."
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if (self.group, self.decimal) not in _STYLES or not isinstance(self.before + self.after, str):
            raise ValueError(f"no known way to write numbers: {self!r}")

    def read(self, cell: str) -> float | None:
        """The number in a cell, None if it is not written this way."""
        parts = _parts(cell)
        if parts is None:
            return None
        before, number, after = parts
        if (before, after) != (self.before, self.after) or not self._fits(number):
            return None
        return float(number.replace(self.group, "").replace(self.decimal, "."))

    def _fits(self, number: str) -> bool:
        return _STYLES[self.group, self.decimal].fullmatch(number.lstrip("+-")) is not None

    def __str__(self) -> str:
        return f"{self.before}1{self.group}234{self.decimal}5{self.after}"


PLAIN = Spelling()


def _parts(cell: str) -> tuple[str, str, str] | None:
    """What stands before a number, the number with its sign, and what stands behind it."""
    cell = cell.strip()
    match = _CELL.fullmatch(cell.translate(_SAME)) if len(cell) <= LONGEST else None
    if match is None or (match["sign"] and match["inner"]):
        return None
    return match["before"] or "", match["sign"] + match["inner"] + match["body"], (match["after"] or "").rstrip()


def spelling_of(cells: Collection[str]) -> Spelling | None:
    """The spelling that all cells share; None if there is none."""
    numbers, around = [], set()
    for cell in cells:
        parts = _parts(cell)
        if parts is None:
            return None
        before, number, after = parts
        numbers.append(number)
        around.add((before, after))
    if len(around) != 1:
        return None
    for group, decimal in _STYLES:
        spelling = Spelling(group, decimal, *next(iter(around)))
        if all(spelling._fits(number) for number in numbers):
            return spelling
    return None


def nearly(cells: Collection[str]) -> Spelling | None:
    """The spelling of the cells that are numbers, where they make a column of numbers with some text in it.

    One plain number is enough to expect numbers; those with separators or signs must be most of the cells.
    """
    plain = [cell for cell in cells if PLAIN.read(cell) is not None]
    numbers = plain + [cell for cell in cells if _separated(cell)]
    if not plain and 2 * len(numbers) <= len(cells):
        return None
    return spelling_of(numbers) or (PLAIN if plain else None)


def _separated(cell: str) -> bool:
    """Whether a cell is a number with separators, a currency or a per cent sign (a mere unit may be a code: 4a)."""
    parts = _parts(cell)
    return parts is not None and bool(parts[0] or "%" in parts[2] or set(parts[1]) & set(",' "))


def doubtful(cells: Collection[str]) -> str | None:
    """Why cells are neither numbers nor plain text, said of the first that shows it; None if they are."""
    for pattern, plain, problem in _DOUBTFUL:
        first = next((cell for cell in cells if pattern.match(cell)), None)
        if first is not None and all(PLAIN.read(pattern.sub(plain, cell)) is not None for cell in cells):
            return problem.format(first)
    return None
