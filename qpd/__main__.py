"""``python -m qpd`` is ``qpd``."""

from qpd.cli.qpd import main

if __name__ == "__main__":
    main()
