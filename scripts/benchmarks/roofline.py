"""Least cost of a guarantee at every step, counted in products: what no implementation goes below.

    1 + FLOPs of the bounds / FLOPs of a step

with the bounds as they are, and with their Gram matrices alone: any bound that is within a few per
cent of the norm whatever the weights reads at least those (W'W of a matrix, K(θ)*K(θ) of a
convolution at every frequency), as general products. Nothing is timed; a ratio that was measured
may be below one of these only by as much as the bounds' products run faster than the step's.
"""

TITLE = "A guarantee at every step: products / products of the plain step"
GOALS = {"MLP 784-256-128-10, batch 128": 1.5, "MLP 784-256-128-10, batch 512": 1.2}
GOALS |= {"AlexNet 28x28x3, batch 128": 1.15, "ResNet50 224x224x3, batch 32": 1.25}


def measure(quick):
    """One row per network and batch."""
    from tf_lyapunov import models as zoo

    networks = {
        "MLP 784-256-128-10": (lambda: zoo.mlp((784,), 10, widths=[256, 128]), (128, 512)),
        "AlexNet 28x28x3": (zoo.alexnet_cifar, (128,)),
    }
    if not quick:
        networks["ResNet50 224x224x3"] = (lambda: zoo.resnet50((224, 224, 3)), (32,))
    rows = []
    for name, (build, batches) in networks.items():
        step, bounds, grams = counted(build())
        for batch in batches:
            what = f"{name}, batch {batch}"
            rows.append(
                {
                    "network": what,
                    "step, GFLOP": batch * step / 1e9,
                    "bounds, GFLOP": bounds / 1e9,
                    "Gram matrices alone, GFLOP": grams / 1e9,
                    "step with bounds / plain": 1 + bounds / (batch * step),
                    "with Gram matrices / plain": 1 + grams / (batch * step),
                    "goal": GOALS[what],
                }
            )
    return {"rows": rows}


def counted(model):
    """FLOPs of a step per sample, of its bounds, and of the Gram matrices that these form."""
    from tf_lyapunov.planning.bounds import bound_cost
    from tf_lyapunov.planning.counting import layer_costs

    costs = layer_costs(model)
    maps = [m for cost in costs for m in cost.maps]
    bounds = sum(bound_cost(shape, linear_map).flops for shape, linear_map in maps)
    grams = 0
    for shape, linear_map in maps:
        if len(shape) == 2:
            grams += 2 * max(shape) * min(shape) ** 2
        else:
            grams += bound_cost(shape, linear_map, squarings=0).flops
    return sum(cost.forward + cost.backward for cost in costs), bounds, grams
