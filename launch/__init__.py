"""Commands, one a file: each parses arguments, calls the floors below and prints."""
