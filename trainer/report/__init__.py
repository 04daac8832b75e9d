"""An experiment's results as a page for people."""
