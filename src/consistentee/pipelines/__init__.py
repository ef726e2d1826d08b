"""What users call: the classifier and the text generator."""
