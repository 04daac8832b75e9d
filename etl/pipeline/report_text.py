"""The report on a release as lines of text."""

from etl.jobs import event_times
from etl.pipeline.report import Coverage, Report
from etl.text_table import aligned

_BARS = 30  # of the histogram of times, at most
Bars = list[tuple[str, int]]  # first day, events


def lines(report: Report) -> list[str]:
    """The report as text."""
    sources = sorted({source for domain in report.domains for source in domain.covered})
    titles = ["domain", "users", "with hold-out", "items", "with metadata", *(f"from {s}" for s in sources)]
    titles += ["interactions", "average length"]
    rows = [
        [
            domain.name,
            f"{domain.users:,}",
            f"{domain.held_out_users:,}",
            f"{domain.items:,}",
            f"{domain.described_items:,}",
            *(f"{domain.covered[source]:,}" for source in sources),
            f"{domain.interactions:,}",
            f"{domain.average_length:.1f}",
        ]
        for domain in report.domains
    ]
    lines = [f"Release {report.release} of {report.lake}, split {report.split}:", *aligned([titles, *rows])]
    if report.related:
        known = ", ".join(f"{relation} of {count:,}" for relation, count in sorted(report.related.items()))
        lines.append(f"known: {known} items")
    lines += [coverage(one, report) for one in report.coverage]
    lines += [report.homophily.line()] if report.homophily is not None else []
    for (left, right), count in report.shared_users.items():
        items = report.shared_items[left, right]
        lines.append(f"in both {left} and {right}: {count:,} users, {items:,} items")
    lines += [split.line() for split in report.time_splits]
    lines.append(f"{report.events:,} events after cleaning; {report.duplicates:,} exact duplicates dropped")
    lines += _histogram(report)
    lines.append(f"{sum(report.rejected.values()):,} rows in quarantine")
    for (kind, reason), count in report.rejected.most_common(10):
        lines.append(f"  {count:,} of {kind}: {reason}")
    return lines


def coverage(found: Coverage, report: Report) -> str:
    """How many things have a vector, and which share of each domain's items."""
    size = {domain.name: domain.items for domain in report.domains}
    shares = [f"{name} {count / max(1, size[name]):.1%}" for name, count in found.by_domain.items()]
    domains = f"; of the items of {', '.join(shares)}" if shares else ""
    return f"features {found.name}: {found.things:,} of {found.of:,} have one, {found.width} wide{domains}"


def histogram(report: Report, most: int) -> tuple[int, Bars]:
    """Days a bar, and events by day, or by several days, in at most so many bars."""
    first = min(report.days)
    width = -(-(max(report.days) - first + 1) // most)
    counts = dict.fromkeys(range((max(report.days) - first) // width + 1), 0)
    for day, count in report.days.items():
        counts[(day - first) // width] += count
    days = [event_times.written((first + place * width) * event_times.DAY)[:10] for place in counts]
    return width, list(zip(days, counts.values(), strict=True))


def times(report: Report) -> str:
    """First and last time, and the share of rows rejected for their times; empty where times are mere order."""
    if report.times is None:
        return ""
    first, last = map(event_times.written, report.times)
    share = report.outside / (report.events + report.duplicates + sum(report.rejected.values()))
    return f"times {first} to {last} UTC; {report.outside:,} rows ({share:.2%}) rejected for theirs"


def _histogram(report: Report) -> list[str]:
    if report.times is None:
        return []
    width, bars = histogram(report, _BARS)
    highest = max(count for _, count in bars)
    lines = [f"{times(report)}; events by {'day' if width == 1 else f'{width} days'}:"]
    return lines + [f"  {day} {count:>12,} {'#' * -(-count * 40 // highest)}" for day, count in bars]
