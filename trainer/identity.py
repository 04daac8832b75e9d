"""Which of our code a result depends on: what was made by other code is made again."""

from etl.source_hash import source_hash

# Modules that every recipe imports and that change no number: where runs are logged, drawn and described.
WITHOUT_EFFECT = frozenset(
    {
        "etl.command",
        "etl.config",
        "etl.redaction",
        "etl.source_hash",
        "trainer.descriptions",
        "trainer.outbox",
        "trainer.pictures",
        "trainer.provenance",
        "trainer.rank_states",
        "trainer.store",
        "trainer.tracking",
    }
)


def code_hash(module: str) -> str:
    """16 hex digits that change with the sources of `module` and of what it imports, but for WITHOUT_EFFECT."""
    return source_hash(module, without=WITHOUT_EFFECT)
