"""Methods compared on the same backbone, rows, split, seeds, budget and validation.

A cell is one backbone, one data set, one method and one seed: trained in a folder of its own, kept as one JSON file.
"""
