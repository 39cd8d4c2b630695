"""Videos with captions:  KEY.mp4 and KEY.txt, or KEY.json with "caption" or "text"."""

from tandem.data.formats.in_place.base import Format


class VideoFormat(Format):
    name = "video"
    members = "a sample is one video KEY.mp4 and KEY.txt, or KEY.json with a caption"
    kinds = frozenset({"video", "text", "json"})
    medium = "video"


FORMAT = VideoFormat()
