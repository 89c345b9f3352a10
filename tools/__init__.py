"""Programs for the maintainers of the package. Not in the wheel."""
