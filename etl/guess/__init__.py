"""A configuration guessed from a folder's files, with comments on what was seen and what is in doubt."""
