"""Images with captions, as img2dataset writes them:  KEY.jpg and KEY.txt, or KEY.json with "caption" or "text"."""

from tandem.data.formats.in_place.base import Format


class PairsFormat(Format):
    name = "pairs"
    members = "a sample is one image KEY.jpg and KEY.txt, or KEY.json with a caption"
    kinds = frozenset({"image", "text", "json"})
    medium = "image"


FORMAT = PairsFormat()
