"""Kernels of our own, in C++: compiled where they are first used, and never needed.

:mod:`gobelin.kernels.compiled` finds a compiler and keeps what it made; where there is none, callers do without.
"""
