"""Operations that the reader of a model's graph adds to those that were recorded."""

import keras


class Cast(keras.Operation):
    """The cast that a nested model applies to its input, as an operation of its own.

    `is_rounding` says that it is the rounding to a layer's compute dtype, which every layer
    applies to what it takes, and not the type of an `Input`.
    """

    def __init__(self, dtype, is_rounding=False):
        super().__init__(name=f"cast_to_{dtype}")
        self.dtype = dtype
        self.is_rounding = is_rounding

    def call(self, x):
        return keras.ops.cast(x, self.dtype)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, dtype=self.dtype)


class Part(keras.Operation):
    """One output of an operation that has several, such as `split`."""

    def __init__(self, operation, index):
        super().__init__(name=f"{operation.name}_{index}")
        self.operation = operation
        self.index = index

    def call(self, *args, **kwargs):
        return keras.tree.flatten(self.operation(*args, **kwargs))[self.index]

    def compute_output_spec(self, *args, **kwargs):
        spec = self.operation.compute_output_spec(*args, **kwargs)
        return keras.tree.flatten(spec)[self.index]


class Folded(keras.Operation):
    """(n, steps, *shape) to (n·steps, *shape): every step becomes a sample."""

    def __init__(self, steps, shape):
        super().__init__(name="steps_to_samples")
        self.steps, self.shape = steps, tuple(shape)

    def call(self, x):
        return keras.ops.reshape(x, (-1, *self.shape))

    def compute_output_spec(self, x):
        return keras.KerasTensor((None, *self.shape), dtype=x.dtype)


class Unfolded(keras.Operation):
    """(n·steps, *shape) to (n, steps, *shape)."""

    def __init__(self, steps, shape):
        super().__init__(name="samples_to_steps")
        self.steps, self.shape = steps, tuple(shape)

    def call(self, x):
        return keras.ops.reshape(x, (-1, self.steps, *self.shape))

    def compute_output_spec(self, x):
        return keras.KerasTensor((None, self.steps, *self.shape), dtype=x.dtype)


ADDED = (Cast, Folded, Unfolded)


class Refused:
    """Stands for a call that could not be read."""

    def __init__(self, operation):
        self.operation = operation
        self.name = operation.name
