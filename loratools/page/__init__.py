"""Reports as data, as one HTML page that needs nothing else, and as pictures."""
