"""One module or package for each adapter format."""
