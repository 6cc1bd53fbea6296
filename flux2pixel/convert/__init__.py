"""A base rewritten to take and return pixels, and the proof of it. Can be called, as ``flux2pixel.convert``."""

import sys

from flux2pixel.runtime.verb import Verb

sys.modules[__name__].__class__ = Verb
