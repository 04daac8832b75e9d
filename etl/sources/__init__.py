"""Raw logs as Spark frames: one file per raw format, one protocol (`etl.sources.schema.Source`)."""
