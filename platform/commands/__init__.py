"""The commands of the command line: one file each, with `USAGE` and `main(arguments)`."""
