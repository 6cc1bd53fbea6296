"""Scores of models side by side, and their report. Can be called, as ``flux2pixel.evaluate``."""

import sys

from flux2pixel import Verb

sys.modules[__name__].__class__ = Verb
