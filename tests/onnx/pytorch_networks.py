"""Networks of PyTorch, as its users write them."""

import functools
import pathlib
import tempfile

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return functional.relu(x + self.second(functional.relu(self.norm(self.first(x)))))


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.block = Residual(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(functional.relu(self.norm(self.stem(x))))
        x = functional.adaptive_avg_pool2d(self.block(x), 1)
        return self.head(torch.flatten(x, 1))


class Inverted(nn.Module):
    """An inverted bottleneck of MobileNet."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Dense(nn.Module):
    """A block of DenseNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)

    def forward(self, x):
        x = torch.cat([x, functional.relu(self.a(x))], 1)
        x = torch.cat([x, functional.relu(self.b(x))], 1)
        return functional.avg_pool2d(x, 2).mean(dim=(2, 3))


class Mixer(nn.Module):
    """Layer normalizations and products over tokens and channels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.norm, self.tokens = nn.LayerNorm(6), nn.Linear(4, 4)
        self.second, self.channels = nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + functional.gelu(y)
        x = x + functional.gelu(self.channels(self.second(x)))
        return self.head(x.mean(dim=1))


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.norm, self.wide, self.narrow = nn.LayerNorm(4), nn.Linear(4, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.1))

    def forward(self, x):
        y = self.depth(x).permute(0, 2, 3, 1)
        y = self.scale * self.narrow(functional.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.ReLU(),
            nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        return self.up(self.down(x))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        a = functional.relu(self.a(x))
        b = functional.relu(self.b(functional.max_pool2d(a, 2)))
        b = functional.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.c(torch.cat([a, b], 1))


class Halves(nn.Module):
    """Slices, splits and maxima of halves."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        first, second = self.a(x).chunk(2, dim=1)
        return self.b(torch.maximum(first, second)) - x[:, 1:4]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 2)

    def forward(self, x, y):
        both = torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(y))], dim=-1)
        return self.c(both)


class Scaled(nn.Module):
    """Images normalised within the network, as for ImageNet."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.conv, self.head = nn.Conv2d(3, 4, 3, dilation=2), nn.Linear(4, 5)

    def forward(self, x):
        x = functional.leaky_relu(self.conv((x - self.mean) / self.std), 0.1)
        return self.head(functional.adaptive_max_pool2d(x, 1).view(x.size(0), -1))


class Shaped(nn.Module):
    """Sizes computed while it is traced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c * h, w).unsqueeze(1).expand(b, 2, c * h, w)
        return self.linear(functional.pad(x.sum(dim=1).flatten(1), (1, 1))[:, 1:-1])


class Einsum(nn.Module):
    """Products over channels of images, then of tokens."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 3) / 2)
        self.b = nn.Parameter(torch.randn(5, 4) / 2)

    def forward(self, x):
        x = functional.relu(torch.einsum("bchw,dc->bdhw", x, self.a))
        return torch.einsum("bij,jk->bik", x.flatten(2).transpose(1, 2), self.b)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 6) / 2)

    def forward(self, x):
        return functional.softmax(torch.einsum("bij,jk->bki", x, self.a), dim=1)


class Extremes(nn.Module):
    """Parts, their least and largest, and a clipped sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Linear(96, 3)

    def forward(self, x):
        a, b, c = torch.split(self.a(x), [2, 2, 2], dim=1)
        x = torch.cat([torch.maximum(a, b), torch.minimum(b, c), torch.clamp(a + c, -0.5, 1.0)], 1)
        return self.b(x.flatten(1))


class Least(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 9)

    def forward(self, x):
        a, b, c = torch.split(self.a(x), [3, 3, 3], dim=1)
        return torch.minimum(torch.minimum(a, b), c)


class Picked(nn.Module):
    """Entries picked by lists."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3)
        self.register_buffer("rows", torch.tensor([0, 2, 3]))
        self.register_buffer("columns", torch.tensor([1, 1, 0]))

    def forward(self, x):
        x = self.a(x)[:, [2, 0, 1]]
        return torch.tanh(x[:, :, self.rows])[..., self.columns]


def _chain(*layers):
    return nn.Sequential(*layers)


# name: (how to make it, shapes of one sample of each input)
NETWORKS = {
    "multilayer perceptron": (
        lambda: _chain(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        [(5,)],
    ),
    "tanh": (lambda: _chain(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)), [(5,)]),
    "sigmoid and softmax": (
        lambda: _chain(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(dim=1)),
        [(5,)],
    ),
    "log-softmax": (
        lambda: _chain(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 3), nn.LogSoftmax(dim=1)),
        [(5,)],
    ),
    "leaky and parametric": (
        lambda: _chain(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.PReLU(8)),
        [(5,)],
    ),
    "selu and celu": (
        lambda: _chain(nn.Linear(5, 8), nn.SELU(), nn.Linear(8, 8), nn.CELU(1.5)),
        [(5,)],
    ),
    "silu": (lambda: _chain(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3)), [(5,)]),
    "gelu": (lambda: _chain(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)), [(5,)]),
    "gelu by tanh": (
        lambda: _chain(nn.Linear(5, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 3)),
        [(5,)],
    ),
    "mish and softplus": (
        lambda: _chain(nn.Linear(5, 8), nn.Mish(), nn.Linear(8, 8), nn.Softplus()),
        [(5,)],
    ),
    "hard activations": (
        lambda: _chain(
            nn.Linear(5, 8),
            nn.Hardswish(),
            nn.Linear(8, 8),
            nn.Hardsigmoid(),
            nn.Linear(8, 3),
            nn.Hardtanh(-0.5, 0.75),
        ),
        [(5,)],
    ),
    "softsign and tanhshrink": (
        lambda: _chain(nn.Linear(5, 8), nn.Softsign(), nn.Linear(8, 8), nn.Tanhshrink()),
        [(5,)],
    ),
    "batch normalization": (
        lambda: _chain(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        [(5,)],
    ),
    "dropout": (lambda: _chain(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)), [(5,)]),
    "LeNet": (
        lambda: _chain(
            nn.Conv2d(1, 4, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
        [(1, 12, 12)],
    ),
    "small VGG": (
        lambda: _chain(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((2, 2)),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        [(3, 8, 8)],
    ),
    "small ResNet": (SmallResNet, [(3, 16, 16)]),
    "inverted bottleneck": (Inverted, [(4, 6, 6)]),
    "dense block": (Dense, [(3, 6, 6)]),
    "mixer": (Mixer, [(3, 8, 8)]),
    "ConvNeXt block": (ConvNeXt, [(4, 8, 8)]),
    "autoencoder": (Autoencoder, [(1, 8, 8)]),
    "U-net": (UNet, [(1, 8, 8)]),
    "halves": (Halves, [(6,)]),
    "two inputs": (TwoInputs, [(3,), (2,)]),
    "normalised images": (Scaled, [(3, 8, 8)]),
    "computed shapes": (Shaped, [(2, 3, 2)]),
    "series": (
        lambda: _chain(
            nn.Conv1d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2, ceil_mode=True),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        [(2, 11)],
    ),
    "volumes": (
        lambda: _chain(
            nn.Conv3d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        [(1, 4, 4, 4)],
    ),
    "group and instance normalization": (
        lambda: _chain(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.Upsample(scale_factor=2),
            nn.PixelUnshuffle(2),
            nn.ReflectionPad2d(1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        [(3, 8, 8)],
    ),
    "activations of images": (
        lambda: _chain(
            *(nn.Conv2d(2, 2, 1), nn.ELU(), nn.Conv2d(2, 2, 1), nn.SELU()),
            *(nn.Conv2d(2, 2, 1), nn.CELU(), nn.Conv2d(2, 2, 1), nn.PReLU()),
            *(nn.Conv2d(2, 2, 1), nn.Hardsigmoid(), nn.Conv2d(2, 2, 1), nn.Hardswish()),
            *(nn.Conv2d(2, 2, 1), nn.LogSigmoid(), nn.Conv2d(2, 2, 1), nn.Softplus()),
            *(nn.Conv2d(2, 2, 1), nn.Softsign(), nn.Conv2d(2, 2, 1), nn.Mish()),
            *(nn.Conv2d(2, 2, 1), nn.SiLU(), nn.Conv2d(2, 2, 1), nn.Softshrink()),
            *(nn.Conv2d(2, 2, 1), nn.LogSoftmax(dim=1)),
        ),
        [(2, 3, 3)],
    ),
    "gaps and ceilings": (
        lambda: _chain(
            nn.Conv2d(2, 4, 3, dilation=2, groups=2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2),
            nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        [(2, 9, 9)],
    ),
    "norm pools": (
        lambda: _chain(nn.Conv2d(2, 3, 3), nn.LPPool2d(2, 2), nn.Flatten(), nn.LazyLinear(3)),
        [(2, 8, 8)],
    ),
    "products by letters": (Einsum, [(3, 2, 3)]),
    "products of tokens": (Tokens, [(3, 4)]),
    "extremes": (Extremes, [(2, 6, 6)]),
    "least of three": (Least, [(4,)]),
    "picked entries": (Picked, [(2, 6, 6)]),
}


def exported(name, path, *, dynamo, dynamic=True):
    """Writes a network to a file, and returns it with inputs of three samples."""
    torch.manual_seed(0)
    make, shapes = NETWORKS[name]
    network = make()
    inputs = tuple(torch.randn(3, *shape) for shape in shapes)
    network.train()
    with torch.no_grad():
        for _ in range(3):  # statistics and lazy sizes
            network(*inputs)
    network.eval()
    names = [f"input_{i}" for i in range(len(shapes))]
    given = inputs if dynamic else tuple(x[:1] for x in inputs)
    options = {"input_names": names, "output_names": ["logits"], "dynamo": dynamo}
    if dynamic and dynamo:
        options["dynamic_shapes"] = [{0: torch.export.Dim("batch", min=2)} for _ in shapes]
        if len(shapes) > 1 or not isinstance(network, nn.Sequential):
            options["dynamic_shapes"] = tuple(options["dynamic_shapes"])
    elif dynamic:
        options["dynamic_axes"] = {n: {0: "batch"} for n in (*names, "logits")}
    torch.onnx.export(network, given, str(path), verbose=False, **options)
    with torch.no_grad():
        return network, [x.numpy() for x in inputs], network(*inputs).numpy()


@functools.cache
def written(name):
    """`(bytes of the old exporter's file, inputs, outputs)` of a network, made once."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "net.onnx")
        _, inputs, outputs = exported(name, path, dynamo=False)
        return path.read_bytes(), inputs, outputs
