"""`python -m qpd.lab` is `qplab`."""

from qpd.lab.cli import main

if __name__ == "__main__":
    main()
