"""How much is computed at one time, each size with its reason.

No value depends on them, but for its rounding, and for the directions that a random search draws in such portions.
"""

import torch

# the largest table of embeddings against clusters, in bytes: the few that are held at once fit into a core's cache
TABLE_BYTES = 2**22
# the same on a GPU, where a table has to be large enough to keep every multiprocessor at work; a few are held at once
KERNEL_TABLE_BYTES = 2**26
# images in one pass without gradient: one layer of the paper's ResNet-18 holds at most 128 MiB of activations; the two
# differ because the published rows were computed so, and a network's last digits may depend on it
IMAGES_EMBEDDED = 512
IMAGES_PREDICTED = 256
# images that a random search tries at one time, or a batch of images where that is larger
IMAGES_TRIED = 256
# of the Fourier transform of a convolution of 512 channels, in double precision and with its Gram matrices: 0.5 GB
FOURIER_BLOCKS = 64


def rows_within(width: int, dtype: torch.dtype) -> int:
    """How many rows of ``width`` numbers fit into `TABLE_BYTES`; at least one."""
    return max(1, TABLE_BYTES // (width * dtype.itemsize))
