"""Reads what somebody else may have written: believed once it is checked."""
