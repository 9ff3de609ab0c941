"""Adapters: small files that change what a model does, added to it and taken out again."""
