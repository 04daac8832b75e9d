"""One file a recipe, each read top to bottom; `dispatch` runs one by its name."""
