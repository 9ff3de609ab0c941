"""Training recipes: the stages of a run and their order."""
