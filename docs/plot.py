#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Draws docs/round-trips.svg from docs/round-trips.json: size against latency, both logarithmic.

    python3 docs/plot.py

Needs Python 3 and nothing else. The data has one JSON object a line. An object with "run" says
where and when the points behind it were measured; the points are what `ping_pong --json` prints. To
measure again, replace the points of the run "plot", and correct its first line.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT = 920, 560
LEFT, RIGHT, TOP, BOTTOM = 76, 236, 56, 104
SIZES = (64, 4 << 20)
MICROSECONDS = (0.05, 5000)

# run, transports in the data, label, colour, dashes, marker
SERIES = [
    ("plot", ["shmipc-glommio-sleep"], "this crate, peer asleep", "#0072b2", "7 4", "disc"),
    ("plot", ["uds-glommio"], "Unix socket, glommio", "#e69f00", "", "disc"),
    ("plot", ["uds-blocking"], "Unix socket, blocking", "#d55e00", "", "disc"),
    ("plot", ["shmipc-glommio-adaptive"], "this crate, default", "#0072b2", "", "disc"),
    ("plot", ["floor", "raw-same"], "floor: bare memory", "#666666", "2 3", "disc"),
    ("earlier", ["shmipc-rs"], "crate shmipc", "#009e73", "1 4", "diamond"),
    ("earlier", ["uds-blocking"], "Unix socket, blocking", "#d55e00", "1 4", "square"),
]
HEADINGS = {"plot": None, "earlier": "Another machine:"}


def read(path):
    """The runs by name, each with its head and its points."""
    runs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "run" in entry:
            runs[entry["run"]] = points = {"head": entry, "points": []}
        else:
            points["points"].append(entry)
    return runs


def x_of(size):
    low, high = map(math.log2, SIZES)
    return LEFT + (math.log2(size) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(microseconds):
    low, high = map(math.log10, MICROSECONDS)
    share = (math.log10(microseconds) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def size_name(size):
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def time_name(microseconds):
    return f"{microseconds / 1000:g} ms" if microseconds >= 1000 else f"{microseconds:g} µs"


def text(x, y, words, anchor="start", size=13, colour="#222222", more=""):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' fill="{colour}"{more}>{words}</text>'
    )


def line(points, colour, width=1.0, dashes=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
    )


def marker(kind, x, y, colour):
    if kind == "disc":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind == "diamond" else ""
    return (
        f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="#ffffff"'
        f' stroke="{colour}" stroke-width="1.5"{turn}/>'
    )


def axes():
    parts = []
    low_y, high_y = HEIGHT - BOTTOM, TOP
    for power in range(-1, 4):
        y = y_of(10**power)
        parts.append(line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd"))
        parts.append(text(LEFT - 8, y + 4, time_name(10**power), "end"))
    for power in range(6, 23, 2):
        x = x_of(1 << power)
        parts.append(line([(x, low_y), (x, high_y)], "#eeeeee"))
        parts.append(text(x, low_y + 18, size_name(1 << power), "middle"))
    corners = [(LEFT, high_y), (LEFT, low_y), (WIDTH - RIGHT, low_y)]
    return [*parts, line(corners, "#222222")]


def series(runs):
    parts, y, heading = [], TOP + 16, None
    for run, transports, label, colour, dashes, kind in SERIES:
        if run not in runs:
            continue
        found = [
            (point["size"], point["p50_ns"] / 1000)
            for point in runs[run]["points"]
            if point["transport"] in transports and point["streams"] == 1
            and point["touch"] and not point["one_cpu"]
        ]
        if not found:
            continue
        places = [(x_of(size), y_of(time)) for size, time in sorted(found)]
        parts.append(line(places, colour, 2 if kind == "disc" else 1.5, dashes))
        parts += [marker(kind, *place, colour) for place in places]
        if HEADINGS[run] != heading:
            heading = HEADINGS[run]
            y += 12
            parts.append(text(WIDTH - RIGHT + 22, y + 4, heading))
            y += 24
        x = WIDTH - RIGHT + 22
        parts.append(line([(x, y), (x + 30, y)], colour, 2, dashes))
        parts.append(marker(kind, x + 15, y, colour))
        parts.append(text(x + 38, y + 4, label))
        y += 24
    return parts


def caption(runs):
    here = runs["plot"]["head"]
    lines = [
        f'{here["machine"]}; {here["processors"]}; {here["date"]}, {here["commit"]}.',
    ]
    if "earlier" in runs:
        other = runs["earlier"]["head"]
        lines.append(
            f'Other machine: {other["machine"]}; {other["processors"]}; {other["date"]},'
            f' {other["commit"]}, from docs/performance.md.'
        )
        lines.append("Compare only series of the same machine.")
    start = HEIGHT - BOTTOM + 44
    return [
        text(LEFT - 48, start + 18 * number, words, size=12, colour="#555555")
        for number, words in enumerate(lines)
    ]


def main():
    runs = read(HERE / "round-trips.json")
    title = "Median round trip by message size, one stream, a processor for each side"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" role="img">',
        "<!-- Made by docs/plot.py from docs/round-trips.json. -->",
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(LEFT, 32, title, size=16, more=' font-weight="bold"'),
        *axes(),
        *series(runs),
        *caption(runs),
        "</svg>",
    ]
    (HERE / "round-trips.svg").write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
