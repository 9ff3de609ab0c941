"""Looking inside: heat maps of words on pixels, sheets, a page, and the shapes at every attention.

It sees attention probabilities by site and the words' tokens; a network only to trace its shapes.
"""
