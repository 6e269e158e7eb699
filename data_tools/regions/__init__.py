"""Regions of pictures on disk: features, positions and classes of the same number of regions a picture."""
