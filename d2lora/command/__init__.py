"""The command line: from what is typed to jobs that a launcher does."""
