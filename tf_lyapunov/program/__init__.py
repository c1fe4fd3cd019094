"""A Keras model read into steps with everything that is known of each."""
