"""Sections of a report: each takes an experiment's results and returns blocks, none if there is nothing to show."""
