"""What a constraint or regularizer is told about the map its kernel stands for."""

import dataclasses

from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.theory.operators import KINDS, PADDINGS, LinearMap


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Keyword arguments that describe a kernel's map; anything left out is bounded over.

    Args:
        input_shape: sizes of the layer's input without the batch axis, `(*spatial,)` or with the
            channels in the place `data_format` says; `None` for any size.
        strides, dilation: an integer or one per spatial axis.
        padding: `"valid"`, `"same"`, `"causal"` or `"any"`, zeros being padded.
        groups: channel groups.
        kind: `"dense"`, `"conv"`, `"depthwise"`, `"conv_transpose"`, or `None`: a matrix is
            dense; a convolution kernel of any kind, or, if `input_shape` is given, of a
            convolution or depthwise convolution.
        output_padding: of a transposed convolution.
        data_format: `"channels_last"` (default) or `"channels_first"`, of `input_shape`.

    Raises:
        ValueError: if an argument is not one of the above.

    Example:

    >>> Geometry(input_shape=(28, 28), padding="same").linear_map((3, 3, 1, 8)).input_shape
    (28, 28, 1)
    >>> Geometry().linear_map((3, 3, 1, 8)) is None
    True
    """

    input_shape: tuple | None = None
    strides: tuple | int = 1
    padding: str = "any"
    dilation: tuple | int = 1
    groups: int = 1
    kind: str | None = None
    output_padding: tuple | int | None = None
    data_format: str | None = None

    def __post_init__(self):
        choices = {
            "kind": (None, *KINDS),
            "padding": ("any", *PADDINGS),
            "data_format": (None, "channels_last", "channels_first"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}. Received: {name}={getattr(self, name)!r}."
                )
        for name in ("input_shape", "strides", "dilation", "output_padding"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        if self.groups != 1 and self.kind not in (None, "conv"):
            raise ValueError(
                f"`groups` is an argument of convolutions. Received: groups={self.groups}, "
                f"kind={self.kind!r}."
            )
        self._map(self.kind or "conv", None)  # validates the integers

    @classmethod
    def of(cls, linear_map):
        """Geometry that says what a `LinearMap` says."""
        return cls(
            input_shape=linear_map.input_shape,
            strides=linear_map.strides or 1,
            padding=linear_map.padding,
            dilation=linear_map.dilation or 1,
            groups=linear_map.groups,
            kind=linear_map.kind,
            output_padding=linear_map.output_padding,
        )

    def get_config(self):
        """The arguments as JSON types."""
        config = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}

    def linear_map(self, kernel_shape):
        """`LinearMap` of a kernel of this shape, or `None` if nothing is known of it.

        Raises:
            ValueError: if the kernel and the arguments contradict each other.
        """
        shape = tuple(int(n) for n in kernel_shape)
        if not 2 <= len(shape) <= 5:
            raise ValueError(
                "A spectral bound needs a kernel of 2 (dense) to 5 (Conv3D) axes. "
                f"Received: shape={shape}. Biases and scales have no operator norm to bound."
            )
        if self.kind is not None and (self.kind == "dense") != (len(shape) == 2):
            raise ValueError(
                f"A kernel of shape {shape} does not fit the kind of map. "
                f"Received: kind={self.kind!r}."
            )
        if len(shape) == 2:
            return LinearMap("dense", (shape[0],))
        if self._says_nothing():
            return None
        kind = self.kind or "conv"
        return self._map(kind, self._channels_last(shape, kind))

    def _says_nothing(self):
        unit = all(n == 1 for n in (*_tuple(self.strides), self.groups))
        return self.kind is None and self.input_shape is None and unit

    def _map(self, kind, input_shape):
        # Causal padding reaches farthest, so that its period serves any padding.
        padding = "causal" if self.padding == "any" else self.padding
        return LinearMap(
            kind,
            input_shape,
            strides=self.strides,
            dilation=self.dilation,
            padding=padding,
            groups=self.groups,
            output_padding=self.output_padding,
        )

    def _channels_last(self, shape, kind):
        if self.input_shape is None or None in self.input_shape:
            return None
        a, b = shape[-2:]
        channels = {"conv": a * self.groups, "depthwise": a, "conv_transpose": b}[kind]
        sizes, rank = self.input_shape, len(shape) - 2
        if len(sizes) == rank + 1:
            first = self.data_format == "channels_first"
            given = sizes[0] if first else sizes[-1]
            sizes = sizes[1:] if first else sizes[:-1]
            if given != channels:
                raise ValueError(
                    f"`input_shape` must have {channels} channels for a {kind} kernel of shape "
                    f"{shape} with groups={self.groups}. Received: {self.input_shape}, "
                    f"data_format={self.data_format!r}."
                )
        if len(sizes) != rank:
            raise ValueError(
                f"`input_shape` must hold {rank} sizes, or {rank + 1} with the channels, for a "
                f"kernel of shape {shape}. Received: input_shape={self.input_shape}."
            )
        return (*sizes, channels)


def single_map(layer):
    """`LinearMap` of the one kernel of a built layer.

    Raises:
        UnsupportedLayerError: if the layer has no known kernel.
        ValueError: if it has two (separable convolutions).
    """
    from tf_lyapunov.spectral.reading import linear_maps

    maps = linear_maps(layer)
    if len(maps) != 1:
        raise UnsupportedLayerError(
            f"A {type(layer).__name__} has two kernels, depthwise and pointwise, whose gains "
            f"multiply. Received: layer {layer.name!r}. Give each its own part of the budget with "
            "`for_map` on the maps of `tf_lyapunov.spectral.reading.linear_maps(layer)`."
        )
    return maps[0][1]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)
