"""The pages' icon, cut out of the book's first figure: three regions that meet around their centroids.

python -m tools.favicon
"""

from PIL import Image

from clustr_core.storage.files import home, written_whole

# the middle of the left panel of fig-cells, in shares of the picture's width and height
CUT = (0.16, 0.22, 0.4, 0.7)
SIZE = 64


def icon(picture: Image.Image) -> Image.Image:
    """A square out of the picture, in the size of an icon."""
    left, top, right, _ = (share * length for share, length in zip(CUT, (*picture.size, *picture.size), strict=True))
    side = right - left
    return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


if __name__ == "__main__":
    with Image.open(home() / "figures/published/quick/fig-cells.png") as figure:
        found = icon(figure)
    with written_whole(home() / "site/favicon.png") as temporary:
        found.save(temporary, format="PNG")
