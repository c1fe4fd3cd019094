"""Data sets in memory (`arrays`) and read from their files while training (`streams`)."""
