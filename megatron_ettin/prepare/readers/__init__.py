"""One module per format: it lists the files of a directory in the format, and reads documents from part of a file."""
