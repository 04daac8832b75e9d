"""graftrec's data side: raw logs in, Delta tables out. See etl/README.md for the map."""
