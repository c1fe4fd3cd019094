"""Properties of networks in the language VNN-LIB: read, decided, and written for other verifiers.

A file states the unsafe set: `unsat` there is PROVED here.
"""
