"""One module a format: what its directories name, and the documents of a range of one of its files."""
