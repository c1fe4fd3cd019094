"""One file per family of operations: what a program can hold, and how Keras is read into it."""
