"""Which of our code a result depends on: what was made by other code is made again."""

from etl.source_hash import source_hash

# Modules that every recipe imports and that change no number: where runs are logged, drawn and described.
WITHOUT_EFFECT = frozenset(
    {
        "etl.command",
        "etl.config",
        "etl.program",
        "etl.settings",
        "etl.redaction",
        "etl.source_hash",
        "etl.text_table",
        "trainer.recipes.training_record",
        "trainer.registry.descriptions",
        "trainer.figures",
        "trainer.parallel.rank_states",
        "trainer.tracking",
    }
)


def code_hash(module: str) -> str:
    """16 hex digits that change with the sources of `module` and of what it imports, but for WITHOUT_EFFECT."""
    return source_hash(module, without=WITHOUT_EFFECT)
