"""Controlling what is painted: where words are looked at from, how strongly, and what an edit may change."""
