"""The simulator against what is known: formulas, published results, and a run it never saw."""
