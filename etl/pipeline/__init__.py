"""All jobs in order, and the report on a release."""
