"""``python -m dbojax`` is the command line."""

from dbojax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
