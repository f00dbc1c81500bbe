"""What `check` found, in the words of people and of programs: one renderer for each file."""
