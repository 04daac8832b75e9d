"""``python -m trainer <recipe> --config NAME [--section.key value …]``: one recipe, one configuration, one exit code.

``python -m trainer --help`` names the recipes, ``python -m trainer <recipe> --help`` lists a recipe's settings. Exit
codes: 0 done; 2 a mistake to mend (one line says which); 3 the gate refused; 4 the loss was not a number; 5 another
process was at work: run again; 143 stopped by a signal: the same command continues.
"""

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

import sys
from collections.abc import Sequence

from etl.command import CommandParser, configurations, run_command
from etl.settings import Section, load
from trainer import config as configs
from trainer.recipes.dispatch import run

RECIPES: dict[str, tuple[type[Section], str]] = {
    "pretrain": (configs.PretrainConfig, "train a model on one domain"),
    "finetune": (configs.FinetuneConfig, "train on a target domain, grafted on a pre-trained model"),
    "search": (configs.SearchConfig, "search settings of pretrain or finetune on the validation part"),
    "evaluate": (configs.EvaluateConfig, "score models beside the simple baselines"),
    "backtest": (configs.BacktestConfig, "train and test at several dates, each on what was before it"),
    "promote": (configs.PromoteConfig, "ask the gate, and move the champion alias if it agrees"),
    "features": (configs.FeaturesConfig, "write vectors of items, users or entities as a Delta table"),
    "friends": (configs.FriendsConfig, "recommend to users without a history by their friends, and measure it"),
    "recommend": (configs.RecommendConfig, "write the top-k of every user as a Delta table"),
    "served": (configs.ServedConfig, "hit rates of served versions, by what users took afterwards"),
    "serve": (configs.ServeConfig, "answer requests over HTTP by the champion, which is followed"),
    "maintain": (configs.MaintainConfig, "list and remove old releases, unfinished files and abandoned runs"),
    "forget": (configs.ForgetConfig, "remove users from lake, models and MLflow"),
    "explain": (configs.ExplainConfig, "say where a recommendation came from"),
    "backup": (configs.BackupConfig, "copy a lake at one release, and its MLflow store"),
    "restore": (configs.RestoreConfig, "put a backup in the place of nothing"),
}

OPERATIONS = ("maintain", "forget", "explain", "backup", "restore")  # which need no configuration of one's own


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m trainer") -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in RECIPES:
        named = "\n".join(f"  {name:<10} {what}" for name, (_, what) in RECIPES.items())
        parser = CommandParser(
            program,
            description=f"recipes:\n{named}\n\n`{program} <recipe> --help` lists a recipe's settings.",
        )
        parser.add_argument("recipe", choices=RECIPES)
        parser.add_argument("--config", help="a YAML file, or a name under conf/, e.g. pretrain/ml1m")
        parser.parse_known_args(given)
        parser.error("expected a recipe before its settings")
    recipe, *rest = given
    kind, what = RECIPES[recipe]
    parser = CommandParser(f"{program} {recipe}", description=f"{what}\n\n{configurations(recipe)}", settings=kind)
    default = f"{recipe}/default" if recipe in OPERATIONS else None
    parser.add_argument(
        "--config", required=default is None, default=default, help="a YAML file, or a name under conf/"
    )
    known, overrides = parser.parse_known_args(rest)
    return run_command(recipe, lambda: run(recipe, load(kind, known.config, overrides)))


if __name__ == "__main__":
    stopping.leave(main())
