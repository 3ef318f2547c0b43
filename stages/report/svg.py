"""A matplotlib figure as SVG inside a page: colours of the page's scheme, real text, no ids that clash.

Figures are drawn with stand-ins for colours, which become CSS variables here, so that one picture
serves a light and a dark page. Text stays text: it is found by a search, and the page sets its font.
"""

import io
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from ...storage.shown import shown

# Stand-in -> variable of style.css. Series colours repeat after the last.
N_SERIES = 8
INK, MUTED, GRID, SURFACE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(N_SERIES))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
_COLOUR = re.compile("|".join(_VARIABLES))
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font-family:[^;]*;?\s*|font: (\S+) [^;]*")
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAMESPACE = re.compile(r"^\{[^}]*\}")

WIDTH, HEIGHT = 3.9, 2.9  # inches of 72 points; a page shows one at 340 to 460 pixels

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sae-pipe",  # the same figure gives the same bytes
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.color": INK,
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
}
_DRAWING = threading.Lock()  # matplotlib is not made for threads


def draw(
    paint: Callable[[Any], None],
    *,
    name: str,
    title: str,
    description: str,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> str:
    """The <svg> of what `paint` draws on a matplotlib figure.

    name: unique on the page, of letters, digits and dashes; title, description: what is read out in
    place of the picture. Nothing but the figure decides the bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with _DRAWING, matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Of letters that its own font lacks: the browser has fonts of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _embedded(file.getvalue(), name, title, description)


def _embedded(source: str, name: str, title: str, description: str) -> str:
    # A name may hold what XML cannot.
    source = _NO_XML.sub("\N{REPLACEMENT CHARACTER}", source)
    root = ElementTree.fromstring(source)
    used = set(re.findall(r"""(?:href="|url\()#([^")]+)""", source))
    for parent in list(root.iter()):
        for child in list(parent):
            if _plain(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _plain(element.tag)
        element.attrib = {
            _plain(key): _value(_plain(key), value, name, used)
            for key, value in element.attrib.items()
            if _plain(key) != "id" or value in used
        }
        element.text, element.tail = (_unless_blank(text) for text in (element.text, element.tail))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-labelledby": f"{name}-t {name}-d"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag[0]}"})
        element.text = shown(text)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _plain(name: str) -> str:
    """A tag or attribute without its namespace: inside HTML there is none."""
    return _NAMESPACE.sub("", name)


def _value(key: str, value: str, name: str, used: set[str]) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    for each in used:
        value = value.replace(f"url(#{each})", f"url(#{name}-{each})")
    if key == "style":
        value = _FONT.sub(lambda found: f"font-size: {found[1]}" if found[1] else "", value)
        value = _COLOUR.sub(lambda found: f"var({_VARIABLES[found[0]]})", value)
    if key in ("d", "transform", "x", "y"):
        value = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value)
        value = " ".join(value.split())
    return value


def _unless_blank(text: str | None) -> str | None:
    return None if text is None or not text.strip() else text
