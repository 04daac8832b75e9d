"""What keeps a lake in order between runs: removing old releases, forgetting users, backups. None of it needs Spark."""
