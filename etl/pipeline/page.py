"""The report on a release as a page: one HTML file that needs nothing else."""

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from etl.pipeline.report import DomainReport, Report
from etl.pipeline.report_text import coverage, histogram, times
from etl.tables import DOMAIN_ALL

_DAYS = 90  # bars of the histogram of times, at most
_POINTS = 60  # of the curve of popularity
_SHARES = (0.01, 0.1, 0.5)  # of items
_REJECTED = 50  # reasons, at most
_LENGTHS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 100_000, 1_000_000]


def to_html(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share: f"{share * 100:.3g}\u00a0%"
    width, days = histogram(report, _DAYS) if report.times is not None else (0, [])
    return environment.get_template("page.html.j2").render(
        report=report,
        made=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sources=sorted({source for domain in report.domains for source in domain.covered}),
        coverage=[coverage(one, report) for one in report.coverage],
        times=times(report),
        width=width,
        days=days,
        lengths=[(domain.name, _lengths(domain.lengths)) for domain in report.domains if domain.users],
        curves=[(domain.name, _curve(domain)) for domain in report.domains if domain.items],
        shares=_SHARES,
        most=[(domain, [_share_of_most(domain, share) for share in _SHARES]) for domain in report.domains],
        overlap=_overlap(report),
        rejected=report.rejected.most_common(_REJECTED),
        num_rejected=sum(report.rejected.values()),
    )


def _lengths(lengths: Counter[int]) -> list[tuple[str, int]]:
    """Users by the length of their sequences."""
    longest = max(lengths)
    bounds = [bound for bound in _LENGTHS if bound <= longest]
    bars = []
    for low, high in pairwise([*bounds, longest + 1]):
        label = str(low) if high == low + 1 else f"{low:,} to {high - 1:,}"
        bars.append((label, sum(users for length, users in lengths.items() if low <= length < high)))
    return bars


def _curve(domain: DomainReport) -> list[tuple[float, float]]:
    """(share of items, the most popular first; share of events that they have)."""
    total = max(1, int(domain.degrees.sum()))
    places = np.unique(np.linspace(0, len(domain.degrees), _POINTS).astype(int))
    shares = np.concatenate([[0], np.cumsum(domain.degrees)])[places] / total
    return list(zip((places / len(domain.degrees)).tolist(), shares.tolist(), strict=True))


def _share_of_most(domain: DomainReport, share: float) -> float:
    """The share of events that the most popular items have."""
    most = domain.degrees[: max(1, round(share * len(domain.degrees)))]
    return float(most.sum() / max(1, domain.degrees.sum()))


def _overlap(report: Report) -> list[tuple[str, list[Any]]]:
    """Domain -> for each domain the shared users and items; None for itself."""
    names: Sequence[str] = [domain.name for domain in report.domains if domain.name != DOMAIN_ALL]

    def cell(one: str, other: str) -> tuple[int, int] | None:
        pair = (min(one, other), max(one, other))
        return (report.shared_users[pair], report.shared_items[pair]) if pair in report.shared_users else None

    return [(one, [cell(one, other) for other in names]) for one in names] if len(names) > 1 else []
