"""Measuring: scores on scenes with their controls, attribution of words to pixels, editing, sanity checks; fidelity."""
