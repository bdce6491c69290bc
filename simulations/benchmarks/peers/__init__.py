"""The others: the loop that anyone would write, and the simulators of Flower and pfl-research, on the same task."""
