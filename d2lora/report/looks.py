"""How methods look in tables and figures, and what is special of initializations, by name; the facts are the settings classes'."""

from d2lora.settings import METHOD_NAMES, PLAIN, QUANTIZING, method_of

__all__ = ["COLOURS", "MARKS", "METHODS", "NAMES", "PLAIN", "QUANTIZING", "outline"]

METHODS = METHOD_NAMES  # in the order of tables
NAMES = {name: method_of(name).label for name in METHODS}
COLOURS = {name: method_of(name).colour for name in METHODS}
MARKS = {name: method_of(name).marker for name in METHODS}

_OUTLINE = 7.0  # the side of a square marker in the page's figures


def outline(marker: str) -> str:
    """Return one of matplotlib's markers as the path of an SVG, around (0, 0)."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(marker)
    turned = style.get_transform() + Affine2D().scale(_OUTLINE, -_OUTLINE)  # an SVG's y grows downwards
    path = style.get_path().transformed(turned)
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    segments = path.iter_segments(simplify=False)
    return "".join(
        letters[code] + ("" if code == Path.CLOSEPOLY else " ".join(f"{x:.2f}" for x in vertices))
        for vertices, code in segments
    )
