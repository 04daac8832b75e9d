"""Tables as text, the only renderer of them: aligned for a terminal, or as Markdown.

The first `words` columns are words and stand left, the others are numbers and stand right.
"""

from collections.abc import Sequence


def with_sign(value: float, decimals: int) -> str:
    """A difference: +0.12, -0.12, and without a sign if it rounds to zero."""
    text = f"{value:+.{decimals}f}"
    return text if text.strip("+-0.") else text[1:]


def aligned(rows: Sequence[Sequence[str]], *, words: int = 1, gap: int = 2, rule: bool = False) -> list[str]:
    """Lines of a table whose first row is its head; an empty row is an empty line. `rule`: a line below the head."""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((" " * gap).join(cells).rstrip())
    if rule:
        lines.insert(1, "─" * max(map(len, lines)))
    return lines


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Lines of a Markdown table; what is Markdown in the cells stays so."""
    rule = [":--" if column < words else "--:" for column in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]
