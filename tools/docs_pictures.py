"""The pictures of docs/concepts.md, as SVG: `python tools/docs_pictures.py` writes them into docs/images.

The ladder's is drawn from the shipped profile; the others explain and are not to scale where they say so. (The pictures
of the console are made by a test run: SPECTRAL_SCREENSHOTS=1 with tests/e2e/test_console.py.)
"""

from __future__ import annotations

import json
import struct
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
INK, LINE, PAPER = "#1c2b33", "#5b6b73", "#ffffff"
WEIGHTS, CONTEXT, FREE, FOREIGN = "#90a4ae", "#cfd8dc", "#f5f7f8", "#bcaaa4"
MODELS = ("#00897b", "#5e35b1", "#ef6c00")
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


class Picture:
    """An SVG that grows by shapes. Sizes in pixels; `title` is what a reader hears who cannot see it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
            f"role='img'><title>{escape(title)}</title><rect width='{width}' height='{height}' fill='{PAPER}' rx='6'/>"
        )
        self._parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, label: str = "", ink: str = INK) -> None:
        """A rectangle with a label in its middle."""
        self._parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{w:.1f}' height='{h:.1f}' fill='{fill}' "
            f"stroke='{LINE}' stroke-width='.6'/>"
        )
        if label:
            self.text(x + w / 2, y + h / 2 + 4, label, anchor="middle", ink=ink)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, ink: str = INK) -> None:
        """A line of text."""
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='{ink}' {FONT}>"
            f"{escape(text)}</text>"
        )

    def line(self, points: list[tuple[float, float]], ink: str = LINE, width: float = 1.5, arrow: bool = False) -> None:
        """A line through points, with a tip at its end if it is an arrow."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f"<polyline points='{way}' fill='none' stroke='{ink}' stroke-width='{width}'/>")
        if arrow:
            (_, before), (x, y) = points[-2], points[-1]
            tip = [(x, y), (x - 4, y - 7), (x + 4, y - 7)] if y != before else [(x, y), (x - 7, y - 4), (x - 7, y + 4)]
            self._parts.append(f"<polygon points='{' '.join(f'{a:.1f},{b:.1f}' for a, b in tip)}' fill='{ink}'/>")

    def dot(self, x: float, y: float, ink: str) -> None:
        """A point of a plot."""
        self._parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{ink}'/>")

    def __str__(self) -> str:
        return self._head + "".join(self._parts) + "</svg>\n"


def memory() -> Picture:
    """A card before and after a squeeze."""
    picture = Picture(
        720, 250, "A graphics card's memory before and after a squeeze: the caches shrink, a third model fits."
    )
    scale, left = 42.0, 24.0
    weights = [(2.6, WEIGHTS, "weights A"), (2.6, WEIGHTS, "weights B")]
    rest = [(1.4, FOREIGN, "others"), (0.9, FREE, "")]
    caches = [(0.9, CONTEXT, ""), (4.4, MODELS[0], "cache A, 6x"), (3.2, MODELS[1], "cache B, 6x")]
    squeezed = [(1.2, CONTEXT, ""), (2.4, MODELS[0], "A, 12x"), (1.8, MODELS[1], "B, 12x"), (1.1, MODELS[2], "C")]
    parts = {"before": weights + caches + rest, "after": [*weights, (2.0, WEIGHTS, "weights C"), *squeezed, *rest]}
    for row, (name, pieces) in enumerate(parts.items()):
        y = 40 + row * 100
        picture.text(
            left,
            y - 10,
            {"before": "Two models are hot", "after": "A third is asked for: caches are squeezed, nobody is evicted"}[
                name
            ],
        )
        x = left
        for size, fill, label in pieces:
            picture.box(x, y, size * scale, 44, fill, label, PAPER if fill in MODELS else INK)
            x += size * scale
    picture.text(
        left,
        232,
        "Grey: weights, contexts. Colours: caches, one for each model. Brown: other programs. White: free.",
        size=11,
        ink=LINE,
    )
    return picture


def sequence() -> Picture:
    """What is kept of one sequence in one layer."""
    picture = Picture(
        720, 250, "One sequence's cache: four exact sinks, packed pages of sixteen tokens, and a recent window."
    )
    y = 56
    picture.text(24, 34, "One sequence in one layer, oldest token on the left")
    picture.box(24, y, 46, 50, "#ffe082", "sinks")
    for page in range(7):
        picture.box(74 + page * 58, y, 54, 50, MODELS[0], f"page {page + 1}", PAPER)
    picture.box(484, y, 212, 50, "#ffe082", "recent window")
    picture.text(47, y + 68, "4, bf16", anchor="middle", size=11)
    picture.text(277, y + 68, "16 tokens each, as codes only", anchor="middle", size=11)
    picture.text(590, y + 68, "112 to 127, 8 or 10 bits", anchor="middle", size=11)
    picture.text(
        24, 160, "One page: latents in the order of what they carry; the first get many bits, the last none", size=12
    )
    widths, x = [6, 6, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0], 24.0
    for bits in widths:
        picture.box(x, 226 - bits * 8, 40, max(1, bits * 8), MODELS[0] if bits else FREE)
        picture.text(x + 20, 240, str(bits), anchor="middle", size=10)
        x += 42
    return picture


def request() -> Picture:
    """The hops of a request."""
    picture = Picture(720, 230, "A request's way: client, gateway, scheduler, worker, engine, and back as a stream.")
    boxes = [
        (24, "client", FREE),
        (168, "gateway", "#b2dfdb"),
        (392, "worker of model A", MODELS[0]),
        (576, "GPU", CONTEXT),
    ]
    widths = {"client": 90, "gateway": 150, "worker of model A": 150, "GPU": 120}
    for x, name, fill in boxes:
        picture.box(x, 50, widths[name], 54, fill, name, PAPER if fill == MODELS[0] else INK)
    picture.box(168, 150, 150, 46, "#b2dfdb", "scheduler")
    picture.box(392, 150, 150, 46, MODELS[1], "worker of model B", PAPER)
    for start, end in ((114, 168), (318, 392), (542, 576)):
        picture.line([(start, 70), (end, 70)], arrow=True)
        picture.line([(end, 88), (start, 88)], "#b0bec5")
    picture.line([(243, 104), (243, 150)], arrow=True)
    picture.line([(542, 173), (636, 173), (636, 104)], "#b0bec5")
    for x, text in ((141, "HTTP"), (355, "socket"), (559, "")):
        picture.text(x, 44, text, anchor="middle", size=11, ink=LINE)
    picture.text(250, 132, "who is hot, where, at which setting", size=11, ink=LINE)
    picture.text(
        24,
        220,
        "The gateway never loads torch. Each worker is a process of its own: it can be lost without losing the others.",
        size=11,
        ink=LINE,
    )
    return picture


def ladder() -> Picture:
    """The shipped profile's settings: bits against measured KL."""
    rows = shipped_ladder()
    picture = Picture(720, 320, "The demo model's ladder: measured KL against bits per number, from 3.5x down to 16x.")
    import math

    left, top, width, height = 80.0, 40.0, 600.0, 220.0
    most, least = max(bits for _, bits, _ in rows), 0.0
    low, high = math.floor(math.log10(min(kl for *_, kl in rows))), math.ceil(math.log10(max(kl for *_, kl in rows)))

    def place(bits: float, kl: float) -> tuple[float, float]:
        return left + (bits - least) / (most - least) * width * 0.95, top + (high - math.log10(kl)) / (
            high - low
        ) * height

    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        picture.line([(left, y), (left + width, y)], "#e0e0e0", 1)
        picture.text(left - 8, y + 4, f"{10.0**power:g}", anchor="end", size=11)
    for bits in range(int(most) + 1):
        picture.text(place(bits, 1)[0], top + height + 18, str(bits), anchor="middle", size=11)
    picture.line([place(bits, kl) for _, bits, kl in rows], MODELS[0])
    for name, bits, kl in rows:
        picture.dot(*place(bits, kl), MODELS[0])
        picture.text(place(bits, kl)[0] + 6, place(bits, kl)[1] - 7, name, size=11)
    picture.text(24, 24, "KL against the exact cache (nats per token), measured; lower is better")
    picture.text(left + width / 2, top + height + 42, "bits per number of keys and values", anchor="middle")
    return picture


def shipped_ladder() -> list[tuple[str, float, float]]:
    """(name, bits per number, KL) of each setting in the shipped profile, from its header."""
    with (ROOT / "profiles" / "demo-7m.safetensors").open("rb") as file:
        head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    document = json.loads(json.loads(head["__metadata__"]["spectral"])["document"])
    return [(row["name"], float(row["bits_per_element"]), float(row["kl_mean"])) for row in document["ladder"]]


PICTURES = {"memory": memory, "sequence": sequence, "request": request, "ladder": ladder}


def main() -> None:
    """Write all of them."""
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
