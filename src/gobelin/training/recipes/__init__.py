"""Training recipes: which stages are trained, in which order."""
