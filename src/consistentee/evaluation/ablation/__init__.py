"""What each part of the method gives: one switch at a time, on the cells of a comparison."""
