"""What to buy and how to run it: the search for the placement with the highest goodput per GPU."""
