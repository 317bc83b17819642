"""Colours of niches: one per number, the same in every plot."""

from __future__ import annotations

import colorsys

# The colours of Okabe and Ito without black, then colours far in CIELAB from all before them, from white and from light
# grey, as seen with normal and with simulated red- or green-blind vision (Machado 2009); further blues come late, since
# beside those of Okabe and Ito they are hard to tell apart on a map of small points.
_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#690069",
    "#4B3C0F", "#78F078", "#E10F4B", "#B4E1A5", "#781E3C", "#D200B4", "#0000FF", "#C3964B",
    "#694B69", "#8796FF", "#874B00", "#0FC3D2", "#E1A5A5", "#4B693C", "#6900B4", "#3C69FF",
)  # fmt: skip
_GOLDEN = 0.618033988749895


def niche_palette(n: int) -> list[str]:
    """Colours of n niches; the colour of a niche depends on its number alone.

    Parameters
    ----------
    n
        Number of niches. The first 24 colours are told apart best, and by readers with red- or green-blind vision.

    Returns
    -------
    n colours as ``"#RRGGBB"``, all different.
    """
    colors = list(_COLORS[:n])
    step = 0
    while len(colors) < n:
        hue = (step * _GOLDEN) % 1
        value = (0.95, 0.7, 0.45)[step % 3]
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.55)[step % 2], value)
        color = "#{:02X}{:02X}{:02X}".format(*(round(255 * channel) for channel in rgb))
        if color not in colors:
            colors.append(color)
        step += 1
    return colors
