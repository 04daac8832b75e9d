"""Runs a recipe by its name; each is imported only when it runs."""

from collections.abc import Callable
from typing import Any

from etl.command import run_command
from etl.settings import Section


def run_recipe(recipe: str, config: Section) -> int:
    """Run one recipe; returns its exit code. A mistake to mend is one line on stderr."""
    return run_command(recipe, lambda: run(recipe, config))


def run(recipe: str, config: Section) -> int:
    function = _recipe(recipe)
    from trainer.parallel import distributed

    try:
        function(config)
    finally:
        distributed.leave()
    return 0


def _recipe(name: str) -> Callable[[Any], object]:
    """Imports a recipe when it is used: Spark, or scipy, only where a recipe needs them."""
    match name:
        case "pretrain":
            from trainer.recipes import pretrain

            return pretrain.run
        case "finetune":
            from trainer.recipes import finetune

            return finetune.run
        case "search":
            from trainer.recipes import search

            return search.run
        case "evaluate":
            from trainer.recipes import evaluate

            return evaluate.run
        case "backtest":
            from trainer.recipes import backtest

            return backtest.run
        case "promote":
            from trainer.recipes import promote

            return promote.run
        case "features":
            from trainer.recipes import features

            return features.run
        case "friends":
            from trainer.recipes import friends

            return friends.run
        case "served":
            from trainer.recipes import served

            return served.run
        case "serve":
            from trainer.serving import server

            return server.run
        case "maintain":
            from trainer.recipes import maintain

            return maintain.run
        case "forget":
            from trainer.recipes import forget

            return forget.run
        case "explain":
            from trainer.recipes import explain

            return explain.run
        case "backup" | "restore":
            from trainer.recipes import backup

            return backup.run if name == "backup" else backup.restore
        case _:
            from trainer.recipes import recommend

            return recommend.run
