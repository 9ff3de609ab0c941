"""Adapters: small files that change a model's weights, added to it and removed again."""
