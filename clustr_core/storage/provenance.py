"""Where a number comes from: versions and device."""

import platform
from importlib import metadata
from typing import Any

VERSIONED = ("torch", "torchvision", "numpy", "scikit-learn", "umap-learn")


def environment(device: str) -> dict[str, Any]:
    """Versions and device: what a reader needs to judge a number."""
    return {
        "device": device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in VERSIONED},
    }
