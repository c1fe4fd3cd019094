"""The papers' mathematics in NumPy, as published and in sound form, without Keras or a solver."""
