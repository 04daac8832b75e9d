"""Whether the folder of a log is there: checked before an engine starts, a lake is made or a run is recorded."""

from etl.config import GeneratorSource, LogSource, SourceConfig
from etl.lake.snapshots import local_path
from etl.settings import ConfigError


def check_root(source: SourceConfig, setting: str = "source.root") -> None:
    """Raises ConfigError where a local `root` is no folder. `setting`: its name, as the user gives it."""
    if isinstance(source, GeneratorSource):
        return
    if isinstance(source, LogSource) and (source.events.format == "table" or source.events.path.startswith("/")):
        return  # the root is not read
    folder = local_path(source.root)
    if folder is not None and not folder.expanduser().is_dir():
        raise ConfigError(f"{setting}: expected the folder of the log, found none at {source.root}; mend it")
