"""Images of a user: sources, decoding, aspect-ratio buckets, batches. Nothing here knows of models.

source = open_source("photos/")
tally = Tally(limit=100)
for batch in stream(source, Rules(Buckets(1024, 16)), 8, tally, rank=0, world=1, limit=0):
    batch.unit  # sRGB (B, 3, H, W) in [0, 1]
print(*tally.lines(), sep="\\n")
"""

from flux2pixel.data.buckets import Buckets
from flux2pixel.data.decode import Unreadable
from flux2pixel.data.sources import Record, Source, open_source
from flux2pixel.data.stream import Batch, Rules, Tally, stream

__all__ = ["Batch", "Buckets", "Record", "Rules", "Source", "Tally", "Unreadable", "open_source", "stream"]
