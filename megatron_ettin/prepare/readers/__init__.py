"""One module per format: it lists the files of a directory in the format, and reads documents from a range of a file."""
