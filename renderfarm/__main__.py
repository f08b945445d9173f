"""`python -m renderfarm` is the command `renderfarm`."""

from renderfarm.cli import main

if __name__ == "__main__":
    main()
