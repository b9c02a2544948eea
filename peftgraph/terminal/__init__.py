"""What is printed in a terminal: the console, tables of programs, coloured differences."""
