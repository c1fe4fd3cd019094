"""Linear maps of layers and bounds on their operator norms, in `keras.ops`, on any backend."""
