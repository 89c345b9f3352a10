"""`python -m trimlingual` is the command `trimlingual`."""

from trimlingual.cli import main

if __name__ == "__main__":
    main()
