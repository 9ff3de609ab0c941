"""Looking inside: which word painted which pixel, and what changes when the words are looked at otherwise.

It sees data, probabilities by site and the words' tokens, and never a network.
"""
