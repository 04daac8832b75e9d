"""The survey's experiment: models, transfers and seeds as one plan."""
