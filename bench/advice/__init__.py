"""Whether ``growkern.advise`` is right, judged on the rows of the savings campaign; and what it knows of recipes, derived from them."""
