"""``python -m multiflora`` is the same as ``multiflora``."""

from multiflora.cli import main

if __name__ == "__main__":
    main()
