"""Drawings of proved regions of attraction, one per controller."""

import io

import numpy as np


def picture(regions, plane, steps, labels, measure):
    """Ellipsoids and their box in a plane of two states, with trajectories from their boundaries.

    Args:
        regions: two `RegionOfAttraction` by name; what is not proved is left out.
        plane: numbers of the two states.
        steps: of every trajectory.
        labels: of the axes.
        measure: what `volume` is called.

    Returns:
        SVG bytes.
    """
    from tf_lyapunov.evaluation.drawing import new_figure, style

    plane = list(plane)
    with style("light") as colours:
        page, (axes,) = new_figure(6.0, 4.0)
        shades = colours["others"][0], colours["clean"]
        for (name, region), colour in zip(regions.items(), shades, strict=True):
            if region.matrix is None:
                continue
            paths = region.attack(10, steps=steps).trajectories[..., plane].round(3)
            axes.plot(paths[..., 0], paths[..., 1], color=colour, linewidth=0.6, alpha=0.6)
            angle = np.linspace(0, 2 * np.pi, 120)
            shadow = np.linalg.inv(region.matrix)[np.ix_(plane, plane)]
            edge = np.linalg.cholesky(shadow) @ [np.cos(angle), np.sin(angle)]
            label = f"{name}: {measure} {region.volume:.3g}"
            axes.plot(*edge, color=colour, linewidth=2, label=label)
            h = np.asarray(region.box)[plane]
        axes.plot([-h[0], h[0], h[0], -h[0], -h[0]], [-h[1], -h[1], h[1], h[1], -h[1]],
                  linestyle="--", color=colours["text"], linewidth=1, label="box")  # fmt: skip
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.legend(loc="upper right")
        buffer = io.BytesIO()
        page.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()
