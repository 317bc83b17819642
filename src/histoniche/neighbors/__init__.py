"""Engine: neighbourhoods of cells, arrays in and arrays out."""

from ._batches import Neighborhoods, padded_neighborhoods
from ._graph import NeighborGraph, neighborhood_mean, radius_graph
from ._radius import radius_for_density

__all__ = [
    "NeighborGraph",
    "Neighborhoods",
    "neighborhood_mean",
    "padded_neighborhoods",
    "radius_for_density",
    "radius_graph",
]
