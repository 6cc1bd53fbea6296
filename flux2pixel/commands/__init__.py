"""The commands, one module each; :mod:`flux2pixel.cli` puts them together. None imports torch at module level."""
