"""Tables to figures: what everything looks like, the plane of chapter 1, curves and maps."""
