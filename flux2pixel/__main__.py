"""So that ``python -m flux2pixel``, torchrun and accelerate launch work."""

from flux2pixel.cli import main

if __name__ == "__main__":
    main()
