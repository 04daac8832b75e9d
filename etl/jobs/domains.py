"""Which items a domain has, by rule; the domain `all` has every item. Decided for all items, kept by k-core or not."""

from collections.abc import Sequence
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.config import DomainConfig
from etl.jobs.job import Job, Outcome, Run
from etl.settings import ConfigError, GraftrecError
from etl.tables import DOMAIN_ALL, DOMAINS, ITEMS

SHOWN = 8  # names in a message, the commonest
MAX_DOMAINS = 62  # sequences' job keeps an item's domains as bits of a long


class EmptyDomain(GraftrecError):
    """A rule that no item, or no item that k-core keeps, meets."""


def transform(items: DataFrame, domains: Sequence[DomainConfig]) -> DataFrame:
    """DOMAINS."""
    found = items.select(F.lit(DOMAIN_ALL).alias("domain"), "item", "index", F.lit("every item").alias("rule"))
    for domain in domains:
        named = F.lit(domain.name).alias("domain")
        members = items.where(_meets(domain)).select(named, "item", "index", F.lit(rule(domain)).alias("rule"))
        found = found.unionByName(members)
    return found


def rule(domain: DomainConfig) -> str:
    """A rule as text, e.g. ``none of Action, Crime``."""
    conditions = (("any of", domain.any_of), ("all of", domain.all_of), ("none of", domain.none_of))
    rules = [f"{how} {', '.join(names)}" for how, names in conditions if names]
    text = "; ".join(rules) or "every item"
    return text if domain.attribute is None else f"{domain.attribute}: {text}"


def names_of(domains: Sequence[DomainConfig]) -> list[str]:
    """All domains' names, `all` first."""
    return [DOMAIN_ALL, *(domain.name for domain in domains)]


def check(domains: Sequence[DomainConfig]) -> None:
    """Raise ConfigError for names that can't stand beside each other."""
    names = names_of(domains)
    for name in names:
        if names.count(name) > 1 or not name.strip():
            raise ConfigError(f"domains: expected different names other than {DOMAIN_ALL!r}, found {name!r}; rename it")
    if len(names) > MAX_DOMAINS:
        raise ConfigError(f"domains: expected at most {MAX_DOMAINS - 1}, found {len(domains)}; merge or drop some")


def _meets(domain: DomainConfig) -> Column:
    def has(name: str) -> Column:
        if domain.attribute is None:
            return F.array_contains("categories", name)
        return F.coalesce(F.try_element_at("attributes", F.lit(domain.attribute)) == name, F.lit(False))

    conditions = [~has(name) for name in domain.none_of] + [has(name) for name in domain.all_of]
    if domain.any_of:
        conditions.append(reduce(lambda left, right: left | right, map(has, domain.any_of)))
    return reduce(lambda left, right: left & right, conditions, F.lit(True))


def run(run: Run) -> Outcome:
    check(run.config.domains)
    items = run.read(ITEMS)
    frame = transform(items, run.config.domains)
    counted = frame.join(items.select("item", "kept"), "item").groupBy("domain")
    sizes = {row[0]: (row[1], row[2]) for row in counted.agg(F.count("item"), F.count_if("kept")).collect()}
    for domain in run.config.domains:
        num_items, num_kept = sizes.get(domain.name, (0, 0))
        if num_kept == 0:
            found = "none" if num_items == 0 else f"{num_items:,}, of which k-core keeps none"
            raise EmptyDomain(
                f"domain {domain.name}: expected items that meet its rule ({rule(domain)}), found {found}; "
                f"{advice(items, domain)}"
            )
    run.notes += [f"{name} {kept:,} kept items" for name, (_, kept) in sorted(sizes.items())]
    return run.commit(frame)


def advice(items: DataFrame, domain: DomainConfig) -> str:
    """What items have of that which the domain's rule tests."""
    if domain.attribute is not None:
        entries = items.select(F.explode("attributes").alias("name", "value"))
        if values := _commonest(entries.where(F.col("name") == domain.attribute), "value"):
            return f"the commonest values of {domain.attribute} are {', '.join(values)}"
        return f"the items' attributes are {', '.join(_commonest(entries, 'name')) or 'none at all'}"
    names = _commonest(items.select(F.explode("categories").alias("category")), "category")
    return f"the commonest categories are {', '.join(names) or 'none at all'}"


def _commonest(rows: DataFrame, column: str) -> list[str]:
    found = rows.groupBy(column).count().orderBy(F.desc("count"), column).limit(SHOWN).collect()
    return [row[0] for row in found]


JOB = Job(DOMAINS, run, reads=(ITEMS,), settings=lambda config: [domain.model_dump() for domain in config.domains])
